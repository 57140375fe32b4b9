"""`django-libsql-backend`: a project with users and permissions, migrated, and used through the ORM.

Its transactions are collected by the client: writes of an atomic block are kept there and sent as one batch at its
end, or when something must be read before. What has been sent is committed; an atomic block that fails after that
cannot be rolled back, and says so. That is the client's design over HTTP version 1.
"""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import django
import pytest
from django.conf import settings
from django.core.management import call_command
from django.db import IntegrityError, connection, models, transaction

from tests.clients.steps import BIG_ROWS, ROUNDS, THREADS, VALUES, WORKERS, Program, each_in, expect, fill_sql, main

FIELDS = {int: "integer", float: "real", str: "text", bytes: "blob"}


class Undo(Exception):
    pass


class Project(Program):
    def __init__(self, client: str, url: str) -> None:
        super().__init__(client, url)
        settings.configure(
            DATABASES={"default": {"ENGINE": "django_libsql", "NAME": url, "AUTH_TOKEN": ""}},
            INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "tests.clients.programs.shop"],
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            USE_TZ=True,
            PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        )
        django.setup()

    @property
    def shop(self) -> Any:
        from tests.clients.programs.shop import models as shop

        return shop

    def ddl(self) -> None:
        call_command("migrate", verbosity=0)
        call_command("migrate", "shop", "0001", verbosity=0)
        call_command("migrate", verbosity=0)
        with connection.cursor() as cursor:
            tables = connection.introspection.table_names(cursor)
        assert {"shop_item", "auth_user", "django_migrations"} <= set(tables), tables

    def dml(self) -> None:
        shelf = self.shop.Shelf.objects.create(label="top")
        one = self.shop.Item.objects.create(name="one", size=1, shelf=shelf)
        self.shop.Item.objects.create(name="two", size=2, shelf=shelf)
        expect(self.shop.Item.objects.update(size=models.F("size") + 10), 2)
        one.delete()
        found = self.shop.Item.objects.select_related("shelf").get()
        expect((found.name, found.size, found.note, found.shelf.label), ("two", 12, None, "top"))
        from django.contrib.auth.models import User

        User.objects.create_user("ada", password="secret")
        assert User.objects.get(username="ada").check_password("secret")

    def types(self) -> None:
        for n, value in enumerate(VALUES):
            self.shop.Value.objects.create(n=n, **({} if value is None else {FIELDS[type(value)]: value}))
        for n, value in enumerate(VALUES):
            expect(getattr(self.shop.Value.objects.get(n=n), FIELDS.get(type(value), "integer")), value)
        at = datetime.datetime(2026, 2, 28, 23, 59, 59, 999999, tzinfo=datetime.UTC)
        more = {"record": {"é": [1, None, 2.5]}, "price": Decimal("1234567.89"), "at": at}
        self.shop.Value.objects.create(n=99, **more)
        kept = self.shop.Value.objects.get(n=99)
        expect((kept.record, kept.price, kept.at), tuple(more.values()))

    def batch(self) -> None:
        self.shop.Item.objects.bulk_create([self.shop.Item(name=f"batch {n}", size=n) for n in range(3)])
        expect(self.count("batch "), 3)

    def count(self, prefix: str) -> Any:
        return self.shop.Item.objects.filter(name__startswith=prefix).count()

    def commit(self) -> None:
        self.shop.Item.objects.bulk_create([self.shop.Item(name=f"commit {n}", size=0) for n in range(2)])
        with transaction.atomic():
            self.shop.Item.objects.filter(name="commit 0").update(size=5)
            with transaction.atomic():
                self.shop.Item.objects.filter(name="commit 1").update(size=6)
        sizes = (
            self.shop.Item.objects.filter(name__startswith="commit ").order_by("name").values_list("size", flat=True)
        )
        expect(list(sizes), [5, 6])

    def rollback(self) -> None:
        def undone() -> None:
            with transaction.atomic():
                self.shop.Item.objects.filter(name="two").update(size=99)
                raise Undo

        with pytest.raises(Undo):
            undone()
        expect(self.shop.Item.objects.get(name="two").size, 12)

    def constraint(self) -> None:
        with pytest.raises(IntegrityError, match="UNIQUE constraint failed"):
            self.shop.Item.objects.create(name="two")
        expect(self.count("two"), 1)
        found, created = self.shop.Item.objects.get_or_create(name="two")
        expect((found.size, created), (12, False))

    def big(self) -> None:
        with connection.cursor() as cursor:
            cursor.execute(fill_sql("shop_big"))
        found = self.shop.Big.objects.order_by("n").values_list("n", "label")
        expect(list(found), [(n, f"row {n}") for n in range(1, BIG_ROWS + 1)])

    def concurrent(self) -> None:
        each_in(THREADS, self.work)
        expect(self.shop.Work.objects.count(), WORKERS * ROUNDS)

    def work(self, worker: int) -> None:
        for n in range(ROUNDS):
            self.shop.Work.objects.create(worker=worker, n=n)
            expect(self.shop.Work.objects.filter(worker=worker).count(), n + 1)
        connection.close()

    def hold(self) -> None:
        expect(self.count("two"), 1)

    def idle(self) -> None:
        expect(self.count("two"), 1)
        self.shop.Item.objects.create(name="after the pause")
        expect(self.count("after the pause"), 1)


if __name__ == "__main__":
    main(Project)
