// npm drizzle-orm on @libsql/client, with its migrator.
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { createClient } from "@libsql/client";
import { asc, count, eq, like, sql } from "drizzle-orm";
import { drizzle } from "drizzle-orm/libsql";
import { migrate } from "drizzle-orm/libsql/migrator";
import { blob, integer, real, sqliteTable, text } from "drizzle-orm/sqlite-core";
import { fillSql, main, plain, Program, VALUES } from "./steps.mjs";

const items = sqliteTable("drizzle_items", {
  id: integer().primaryKey({ autoIncrement: true }),
  name: text().unique(),
  size: integer(),
  note: text(),
});
const values = sqliteTable("drizzle_values", {
  n: integer().primaryKey(),
  integer: integer(),
  real: real(),
  text: text(),
  blob: blob({ mode: "buffer" }),
});
const big = sqliteTable("drizzle_big", { n: integer().primaryKey(), label: text() });
const work = sqliteTable("drizzle_work", { worker: integer().notNull(), n: integer().notNull() });
const migrations = { migrationsFolder: fileURLToPath(new URL("migrations", import.meta.url)) };

function columnOf(value) {
  if (value === null || typeof value === "bigint") return "integer";
  return typeof value === "number" ? "real" : typeof value === "string" ? "text" : "blob";
}

class Drizzle extends Program {
  constructor(client, url) {
    super(client, url);
    this.http = createClient({ url, intMode: "bigint" });
    this.db = drizzle(this.http);
  }

  async count(name, through = this) {
    const [found] = await (through.db ?? through).select({ count: count() }).from(items).where(like(items.name, name));
    return found.count;
  }

  async ddl() {
    await migrate(this.db, migrations);
    await migrate(this.db, migrations); // finds nothing to do
    const applied = await this.db.all(sql`SELECT count(*) AS count FROM __drizzle_migrations`);
    assert.equal(Number(applied[0].count), 2);
  }

  async dml() {
    const added = await this.db.insert(items).values([{ name: "one", size: 1 }, { name: "two", size: 2 }]).returning();
    assert.deepEqual(added.map(({ id, name }) => [Number(id), name]), [[1, "one"], [2, "two"]]);
    await this.db.update(items).set({ size: sql`${items.size} + 10` });
    await this.db.delete(items).where(eq(items.name, "one"));
    const rows = await this.db.select().from(items);
    assert.deepEqual(rows.map((row) => [row.name, Number(row.size), row.note]), [["two", 12, null]]);
  }

  async types() {
    for (const [n, value] of VALUES.entries()) {
      await this.db.insert(values).values({ n, [columnOf(value)]: value });
    }
    const rows = await this.db.select().from(values).orderBy(asc(values.n));
    assert.deepStrictEqual(rows.map((row, n) => plain(row[columnOf(VALUES[n])])), VALUES);
  }

  async batch() {
    await this.db.batch([0, 1, 2].map((n) => this.db.insert(items).values({ name: `batch ${n}`, size: n })));
    assert.equal(await this.count("batch %"), 3);
    const clash = ["broken", "two"].map((name) => this.db.insert(items).values({ name }));
    await assert.rejects(this.db.batch(clash));
    assert.equal(await this.count("broken"), 0);
  }

  async commit() {
    const other = new Drizzle(this.client, this.url);
    await this.db.transaction(async (tx) => {
      await tx.insert(items).values({ name: "commit 0" });
      await tx.transaction((nested) => nested.insert(items).values({ name: "commit 1" })); // a savepoint
      assert.equal(await this.count("commit %", tx), 2);
      assert.equal(await this.count("commit %", other), 0);
    });
    assert.equal(await this.count("commit %", other), 2);
  }

  async rollback() {
    const undone = this.db.transaction(async (tx) => {
      await tx.insert(items).values({ name: "rollback" });
      assert.equal(await this.count("rollback", tx), 1);
      tx.rollback();
    });
    await assert.rejects(undone, /Rollback/);
    assert.equal(await this.count("rollback"), 0);
  }

  async constraint() {
    await assert.rejects(this.db.insert(items).values({ name: "two" }), (error) => {
      assert.match(error.cause.message, /UNIQUE constraint failed/);
      assert.equal(error.cause.code, "SQLITE_CONSTRAINT");
      return true;
    });
    assert.equal(await this.count("two"), 1);
  }

  async big() {
    await this.db.run(sql.raw(fillSql("drizzle_big")));
    const rows = await this.db.select().from(big).orderBy(asc(big.n));
    this.checkBig(rows.map(({ n, label }) => [n, label]));
  }

  async workOnce(through, worker, n) {
    await through.db.insert(work).values({ worker, n });
    const [found] = await through.db.select({ count: count() }).from(work).where(eq(work.worker, worker));
    return found.count;
  }

  async rows(text) {
    return (await this.http.execute(text)).rows.map((row) => Array.from(row));
  }

  async run(text) {
    await this.db.run(sql.raw(text));
  }

  another() {
    return new Drizzle(this.client, this.url);
  }

  close() {
    this.http.close();
  }
}

await main((client, url) => new Drizzle("drizzle", url));
