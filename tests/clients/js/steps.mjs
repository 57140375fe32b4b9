// The steps of tests/clients/steps.py for JavaScript clients: one JSON object a line, a pause before the last.
import assert from "node:assert/strict";
import { once } from "node:events";

export const BIG_ROWS = 10_000;
export const WORKERS = 6;
const ROUNDS = 5;
const STEPS = ["ddl", "dml", "types", "batch", "commit", "rollback", "constraint", "big", "concurrent"];

// Integers are BigInt: a Number is sent as a float by some of the clients, and cannot hold the limits anyway.
export const VALUES = [
  null,
  0n,
  -1n,
  2n ** 53n + 1n,
  2n ** 63n - 1n,
  -(2n ** 63n),
  0.1,
  -2.5e-300,
  Number.MAX_VALUE,
  Number.MIN_VALUE,
  "",
  "it's \"quoted\"\\ \n\t é 漢字 😀 \u2028",
  "x".repeat(100_000),
  Buffer.alloc(0),
  Buffer.from([0]),
  Buffer.from([0, 255]),
  Buffer.from(Array.from({ length: 76_800 }, (_, index) => index % 256)),
];

// A blob comes as ArrayBuffer, Uint8Array or Buffer.
export function plain(value) {
  if (value instanceof ArrayBuffer) return Buffer.from(value);
  return ArrayBuffer.isView(value) ? Buffer.from(value.buffer, value.byteOffset, value.byteLength) : value;
}

export function fillSql(table) {
  return (
    `INSERT INTO ${table} (n, label) WITH RECURSIVE counter(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter ` +
    `WHERE n < ${BIG_ROWS}) SELECT n, 'row ' || n FROM counter`
  );
}

// The steps of a client that runs SQL. A subclass says how: `rows(sql, args)` gives arrays of values, `run(sql, args)`
// { changes, lastId }, `batch(statements)`, `script(sql)`, `transaction()` an object with run, rows, commit and
// rollback, `another()` the same kind of program on a connection of its own, `close()`.
export class Program {
  constructor(client, url) {
    this.client = client;
    this.url = url;
    this.table = client.replaceAll(/\W/g, "_");
  }

  async count(name, through = this) {
    const rows = await through.rows(`SELECT count(*) FROM ${this.table}_items WHERE name LIKE ?`, [name]);
    return Number(rows[0][0]);
  }

  async ddl() {
    await this.run(`CREATE TABLE ${this.table}_items (id INTEGER PRIMARY KEY, name TEXT UNIQUE, size INTEGER)`);
    await this.run(`ALTER TABLE ${this.table}_items ADD COLUMN note TEXT`);
    await this.script(
      `CREATE TABLE ${this.table}_values (n INTEGER PRIMARY KEY, value);` +
        `CREATE TABLE ${this.table}_big (n INTEGER PRIMARY KEY, label TEXT);` +
        `CREATE TABLE ${this.table}_work (worker INTEGER, n INTEGER);`,
    );
    const names = ["items", "values", "big", "work"].map((name) => `'${this.table}_${name}'`);
    const made = await this.rows(`SELECT count(*) FROM sqlite_master WHERE tbl_name IN (${names})`);
    assert.equal(Number(made[0][0]), 5); // four tables, and the index of a UNIQUE column
  }

  async dml() {
    const inserted = await this.run(`INSERT INTO ${this.table}_items (name, size) VALUES (?, ?)`, ["one", 1n]);
    assert.equal(Number(inserted.lastId), 1);
    await this.run(`INSERT INTO ${this.table}_items (name, size) VALUES (?, ?)`, ["two", 2n]);
    assert.equal(Number((await this.run(`UPDATE ${this.table}_items SET size = size + 10`)).changes), 2);
    await this.run(`DELETE FROM ${this.table}_items WHERE name = ?`, ["one"]);
    const rows = await this.rows(`SELECT name, size, note FROM ${this.table}_items`);
    assert.deepEqual(rows.map(([name, size, note]) => [name, Number(size), note]), [["two", 12, null]]);
  }

  async types() {
    for (const [n, value] of VALUES.entries()) {
      await this.run(`INSERT INTO ${this.table}_values VALUES (?, ?)`, [BigInt(n), value]);
    }
    const rows = await this.rows(`SELECT value FROM ${this.table}_values ORDER BY n`);
    const wanted = VALUES.map((value) => (typeof value === "bigint" ? this.integer(value) : value));
    assert.deepStrictEqual(rows.map(([value]) => plain(value)), wanted);
  }

  // What the client makes of an integer that it reads.
  integer(value) {
    return value;
  }

  async batch() {
    const sql = `INSERT INTO ${this.table}_items (name, size) VALUES (?, ?)`;
    await this.batchOf([0n, 1n, 2n].map((n) => ({ sql, args: [`batch ${n}`, n] })));
    assert.equal(await this.count("batch %"), 3);
    const clash = ["broken", "two"].map((name) => ({ sql, args: [name, 0n] }));
    await assert.rejects(this.batchOf(clash), /UNIQUE constraint failed/);
    assert.equal(await this.count("broken"), 0); // a batch is one transaction
  }

  async commit() {
    const transaction = await this.transaction();
    for (const n of [0, 1]) {
      await transaction.run(`INSERT INTO ${this.table}_items (name) VALUES (?)`, [`commit ${n}`]);
    }
    assert.equal(await this.count("commit %", transaction), 2);
    const other = await this.another();
    assert.equal(await this.count("commit %", other), 0);
    await transaction.commit();
    assert.equal(await this.count("commit %", other), 2);
    await other.close();
  }

  async rollback() {
    const transaction = await this.transaction();
    await transaction.run(`INSERT INTO ${this.table}_items (name) VALUES ('rollback')`);
    assert.equal(await this.count("rollback", transaction), 1);
    await transaction.rollback();
    assert.equal(await this.count("rollback"), 0);
  }

  async constraint() {
    const again = this.run(`INSERT INTO ${this.table}_items (name) VALUES ('two')`);
    await assert.rejects(again, (error) => {
      assert.match(error.message, /UNIQUE constraint failed/);
      assert.equal(error.code, "SQLITE_CONSTRAINT");
      return true;
    });
    assert.equal(await this.count("two"), 1);
  }

  async big() {
    await this.run(fillSql(`${this.table}_big`));
    this.checkBig(await this.rows(`SELECT n, label FROM ${this.table}_big ORDER BY n`));
  }

  checkBig(rows) {
    const wanted = Array.from({ length: BIG_ROWS }, (_, index) => [index + 1, `row ${index + 1}`]);
    assert.deepEqual(rows.map(([n, label]) => [Number(n), label]), wanted);
  }

  // Half of the workers share this program's connection, half have one of their own.
  async concurrent() {
    const work = async (worker) => {
      const through = worker % 2 ? await this.another() : this;
      for (let n = 0; n < ROUNDS; n++) {
        assert.equal(await this.workOnce(through, worker, n), n + 1);
      }
      if (through !== this) await through.close();
    };
    await Promise.all(Array.from({ length: WORKERS }, (_, worker) => work(worker)));
    assert.equal(Number((await this.rows(`SELECT count(*) FROM ${this.table}_work`))[0][0]), WORKERS * ROUNDS);
  }

  async workOnce(through, worker, n) {
    await through.run(`INSERT INTO ${this.table}_work VALUES (?, ?)`, [BigInt(worker), BigInt(n)]);
    const rows = await through.rows(`SELECT count(*) FROM ${this.table}_work WHERE worker = ?`, [BigInt(worker)]);
    return Number(rows[0][0]);
  }

  async hold() {
    assert.equal(await this.count("two"), 1);
  }

  async idle() {
    assert.equal(await this.count("two"), 1);
    await this.run(`INSERT INTO ${this.table}_items (name) VALUES ('after the pause')`);
    assert.equal(await this.count("after the pause"), 1);
    await this.close();
  }
}

function tell(step, result, detail = "") {
  process.stdout.write(`${JSON.stringify({ step, result, detail })}\n`);
}

async function attempt(program, step) {
  try {
    await program[step]();
    tell(step, "ok");
  } catch (error) {
    tell(step, "error", `${error.stack}\n${error.cause?.stack ?? ""}`);
  }
}

export async function main(make) {
  const [client, url] = process.argv.slice(2);
  const program = await make(client, url);
  for (const step of STEPS) await attempt(program, step);
  await program.hold();
  tell("paused", "ok");
  await once(process.stdin, "data");
  process.stdin.pause();
  await attempt(program, "idle");
}
