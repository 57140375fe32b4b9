"""Models of the migrated project."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Shelf(models.Model):
    label = models.CharField(max_length=100)


class Item(models.Model):
    name = models.CharField(max_length=100, unique=True)
    size = models.IntegerField(null=True)
    note = models.TextField(null=True)
    shelf = models.ForeignKey(Shelf, null=True, on_delete=models.CASCADE)


class Value(models.Model):
    n = models.IntegerField(primary_key=True)
    integer = models.BigIntegerField(null=True)
    real = models.FloatField(null=True)
    text = models.TextField(null=True)
    blob = models.BinaryField(null=True)
    record = models.JSONField(null=True)
    price = models.DecimalField(null=True, max_digits=12, decimal_places=2)
    at = models.DateTimeField(null=True)


class Big(models.Model):
    n = models.IntegerField(primary_key=True)
    label = models.CharField(max_length=100)


class Work(models.Model):
    worker = models.IntegerField()
    n = models.IntegerField()

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["worker", "n"], name="once")]
