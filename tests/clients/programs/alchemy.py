"""SQLAlchemy with `sqlalchemy-libsql`, whose DB-API client is `libsql-experimental`: the ORM and its core."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, func, insert, literal_column, select, text, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import BLOB, Float, Integer, String

from tests.clients.steps import BIG_ROWS, PROCESSES, ROUNDS, VALUES, WORKERS, Program, each_in, expect, fill_sql, main


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "alchemy_items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(unique=True)
    size: Mapped[int | None]
    note: Mapped[str | None]


class Value(Base):
    __tablename__ = "alchemy_values"
    n: Mapped[int] = mapped_column(primary_key=True)
    integer: Mapped[int | None] = mapped_column(Integer)
    real: Mapped[float | None] = mapped_column(Float)
    string: Mapped[str | None] = mapped_column(String)
    blob: Mapped[bytes | None] = mapped_column(BLOB)


class Big(Base):
    __tablename__ = "alchemy_big"
    n: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str]


class Work(Base):
    __tablename__ = "alchemy_work"
    worker: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(primary_key=True)


COLUMNS = {int: "integer", float: "real", str: "string", bytes: "blob"}


def engine_of(url: str) -> Engine:
    return create_engine(url.replace("http:", "sqlite+libsql:") + "/?secure=false")


class Alchemy(Program):
    def __init__(self, client: str, url: str) -> None:
        super().__init__(client, url)
        self.engine = engine_of(url)

    def ddl(self) -> None:
        Base.metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            connection.execute(text("CREATE INDEX alchemy_by_size ON alchemy_items (size)"))
            connection.execute(text("DROP INDEX alchemy_by_size"))
        Base.metadata.create_all(self.engine)  # finds them all: introspection by PRAGMA

    def dml(self) -> None:
        with Session(self.engine) as session:
            session.add_all([Item(name="one", size=1), Item(name="two", size=2)])
            session.commit()
            session.execute(update(Item).values(size=Item.size + 10))
            session.execute(delete(Item).where(Item.name == "one"))
            session.commit()
            found = session.execute(select(Item.id, Item.name, Item.size, Item.note)).all()
        expect([tuple(row) for row in found], [(2, "two", 12, None)])

    def types(self) -> None:
        with Session(self.engine) as session:
            for n, value in enumerate(VALUES):
                row = {} if value is None else {COLUMNS[type(value)]: value}
                if isinstance(value, int) and not -(2**31) <= value < 2**31:
                    row = {"integer": literal_column(str(value))}  # as a parameter its DB-API client sends a float
                if isinstance(value, bytes):  # its DB-API client lacks `Binary`, which SQLAlchemy's type wants
                    session.execute(text("INSERT INTO alchemy_values (n, blob) VALUES (:n, :blob)"), {"n": n, **row})
                else:
                    session.execute(insert(Value).values(n=n, **row))
            session.commit()
        with Session(self.engine) as session:
            for n, value in enumerate(VALUES):
                found = session.get_one(Value, n)
                expect(getattr(found, COLUMNS.get(type(value), "integer")), value)

    def batch(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(insert(Item), [{"name": f"batch {n}", "size": n} for n in range(3)])
        expect(self.count("batch %"), 3)

    def count(self, name: str, engine: Engine | None = None) -> Any:
        with Session(engine or self.engine) as session:
            return session.scalar(select(func.count()).select_from(Item).where(Item.name.like(name)))

    def commit(self) -> None:
        other = engine_of(self.url)  # an engine whose URL names no file keeps one connection a thread
        with Session(self.engine) as session:
            session.add_all([Item(name="commit 0"), Item(name="commit 1")])
            session.flush()
            seen = session.scalar(select(func.count()).select_from(Item).where(Item.name.like("commit %")))
            expect(seen, 2)
            expect(self.count("commit %", other), 0)
            session.commit()
        expect(self.count("commit %", other), 2)

    def rollback(self) -> None:
        with Session(self.engine) as session:
            session.add(Item(name="rollback"))
            session.flush()
            session.rollback()
        expect(self.count("rollback"), 0)

    def constraint(self) -> None:
        with Session(self.engine) as session:
            session.add(Item(name="two"))
            # Its DB-API client has no classes of its own, so that SQLAlchemy cannot tell an IntegrityError either.
            with pytest.raises((SQLAlchemyError, ValueError), match="UNIQUE constraint failed"):
                session.commit()
            session.rollback()
        expect(self.count("two"), 1)

    def big(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(fill_sql("alchemy_big")))
        with Session(self.engine) as session:
            found = session.execute(select(Big.n, Big.label).order_by(Big.n)).all()
        expect([tuple(row) for row in found], [(n, f"row {n}") for n in range(1, BIG_ROWS + 1)])

    def concurrent(self) -> None:
        each_in(PROCESSES, work, self.url)
        with Session(self.engine) as session:
            expect(session.scalar(select(func.count()).select_from(Work)), WORKERS * ROUNDS)

    def hold(self) -> None:
        expect(self.count("two"), 1)  # the connection goes back into the engine's pool

    def idle(self) -> None:
        expect(self.count("two"), 1)
        with Session(self.engine) as session:
            session.add(Item(name="after the pause"))
            session.commit()
        expect(self.count("after the pause"), 1)


def work(url: str, worker: int) -> None:
    """A worker with an engine of its own: every write read back at once."""
    engine = engine_of(url)
    for n in range(ROUNDS):
        with Session(engine) as session:
            session.add(Work(worker=worker, n=n))
            session.commit()
        with Session(engine) as session:
            expect(session.scalar(select(func.count()).select_from(Work).where(Work.worker == worker)), n + 1)


if __name__ == "__main__":
    main(Alchemy)
