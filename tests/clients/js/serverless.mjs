// npm @tursodatabase/serverless, its own interface.
import { connect } from "@tursodatabase/serverless";
import { main, Program } from "./steps.mjs";

class Serverless extends Program {
  constructor(client, url) {
    super(client, url);
    this.db = connect({ url });
  }

  async rows(sql, args = []) {
    const statement = await this.db.prepare(sql);
    return statement.safeIntegers(true).raw(true).all(args);
  }

  async run(sql, args = []) {
    const statement = await this.db.prepare(sql);
    const result = await statement.run(args);
    return { changes: result.changes, lastId: result.lastInsertRowid };
  }

  async batchOf(statements) {
    await this.db.batch(statements, "immediate");
  }

  async script(sql) {
    await this.db.exec(sql);
  }

  // Its transactions are functions; these steps want one that they can look into, so BEGIN is said as SQL.
  async transaction() {
    const own = new Serverless(this.client, this.url);
    await own.db.exec("BEGIN");
    return {
      run: (sql, args) => own.run(sql, args),
      rows: (sql, args) => own.rows(sql, args),
      commit: () => own.db.exec("COMMIT"),
      rollback: () => own.db.exec("ROLLBACK"),
    };
  }

  another() {
    return new Serverless(this.client, this.url);
  }

  async close() {
    await this.db.close();
  }
}

await main((client, url) => new Serverless(client, url));
