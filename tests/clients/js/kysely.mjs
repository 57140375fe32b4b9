// npm kysely with @libsql/kysely-libsql, which brings an @libsql/client of its own; with kysely's migrator.
import assert from "node:assert/strict";
import { LibsqlDialect } from "@libsql/kysely-libsql";
import { Kysely, Migrator, sql } from "kysely";
import { fillSql, main, plain, Program, VALUES } from "./steps.mjs";

const migrations = {
  "1_tables": {
    async up(db) {
      await db.schema
        .createTable("kysely_items")
        .addColumn("id", "integer", (column) => column.primaryKey())
        .addColumn("name", "text", (column) => column.unique())
        .addColumn("size", "integer")
        .execute();
      await sql`CREATE TABLE kysely_values (n INTEGER PRIMARY KEY, value)`.execute(db);
      await db.schema
        .createTable("kysely_big")
        .addColumn("n", "integer", (column) => column.primaryKey())
        .addColumn("label", "text")
        .execute();
      await db.schema.createTable("kysely_work").addColumn("worker", "integer").addColumn("n", "integer").execute();
    },
  },
  "2_note": {
    async up(db) {
      await db.schema.alterTable("kysely_items").addColumn("note", "text").execute();
    },
  },
};

class KyselyProgram extends Program {
  constructor(client, url) {
    super(client, url);
    this.db = new Kysely({ dialect: new LibsqlDialect({ url, intMode: "bigint" }) });
  }

  async count(name, db = this.db) {
    const found = await db
      .selectFrom("kysely_items")
      .select(({ fn }) => fn.countAll().as("count"))
      .where("name", "like", name)
      .executeTakeFirstOrThrow();
    return Number(found.count);
  }

  async ddl() {
    const migrator = new Migrator({ db: this.db, provider: { getMigrations: async () => migrations } });
    for (const wanted of [2, 0]) {
      const { error, results } = await migrator.migrateToLatest();
      if (error) throw error;
      assert.equal(results.length, wanted);
    }
    const tables = await this.db.introspection.getTables();
    assert.ok(tables.some(({ name, columns }) => name === "kysely_items" && columns.length === 4));
  }

  async dml() {
    const added = await this.db
      .insertInto("kysely_items")
      .values([{ name: "one", size: 1n }, { name: "two", size: 2n }])
      .returning(["id", "name"])
      .execute();
    assert.deepEqual(added.map(({ id, name }) => [Number(id), name]), [[1, "one"], [2, "two"]]);
    const changed = await this.db.updateTable("kysely_items").set({ size: sql`size + 10` }).executeTakeFirst();
    assert.equal(Number(changed.numUpdatedRows), 2);
    await this.db.deleteFrom("kysely_items").where("name", "=", "one").execute();
    const rows = await this.db.selectFrom("kysely_items").selectAll().execute();
    assert.deepEqual(rows.map((row) => [row.name, Number(row.size), row.note]), [["two", 12, null]]);
  }

  async types() {
    for (const [n, value] of VALUES.entries()) {
      await this.db.insertInto("kysely_values").values({ n: BigInt(n), value }).execute();
    }
    const rows = await this.db.selectFrom("kysely_values").select("value").orderBy("n").execute();
    assert.deepStrictEqual(rows.map(({ value }) => plain(value)), VALUES);
  }

  async batch() {
    const names = [0, 1, 2].map((n) => ({ name: `batch ${n}`, size: BigInt(n) }));
    await this.db.insertInto("kysely_items").values(names).execute();
    assert.equal(await this.count("batch %"), 3);
    const clash = this.db.insertInto("kysely_items").values([{ name: "broken" }, { name: "two" }]);
    await assert.rejects(clash.execute(), /UNIQUE constraint failed/);
    assert.equal(await this.count("broken"), 0);
  }

  async commit() {
    await this.db.transaction().execute(async (tx) => {
      await tx.insertInto("kysely_items").values([{ name: "commit 0" }, { name: "commit 1" }]).execute();
      assert.equal(await this.count("commit %", tx), 2);
      assert.equal(await this.count("commit %"), 0); // outside the transaction, on the same client
    });
    assert.equal(await this.count("commit %"), 2);
  }

  async rollback() {
    const undone = this.db.transaction().execute(async (tx) => {
      await tx.insertInto("kysely_items").values({ name: "rollback" }).execute();
      assert.equal(await this.count("rollback", tx), 1);
      throw new Error("undo");
    });
    await assert.rejects(undone, /undo/);
    assert.equal(await this.count("rollback"), 0);
  }

  async big() {
    await sql.raw(fillSql("kysely_big")).execute(this.db);
    const rows = await this.db.selectFrom("kysely_big").selectAll().orderBy("n").execute();
    this.checkBig(rows.map(({ n, label }) => [n, label]));
  }

  async workOnce(through, worker, n) {
    await through.db.insertInto("kysely_work").values({ worker, n }).execute();
    const rows = await through.db.selectFrom("kysely_work").selectAll().where("worker", "=", worker).execute();
    return rows.length;
  }

  async rows(text) {
    const result = await sql.raw(text).execute(this.db);
    return result.rows.map((row) => Object.values(row));
  }

  async run(text) {
    await sql.raw(text).execute(this.db);
  }

  another() {
    return new KyselyProgram(this.client, this.url);
  }

  async close() {
    await this.db.destroy();
  }
}

await main((client, url) => new KyselyProgram("kysely", url));
