// npm @libsql/client, over HTTP and over WebSocket; and the same interface by @tursodatabase/serverless/compat.
import * as original from "@libsql/client";
import * as compat from "@tursodatabase/serverless/compat";
import { main, Program } from "./steps.mjs";

class Libsql extends Program {
  constructor(client, url) {
    super(client, url);
    if (client.endsWith("compat")) {
      this.db = compat.createClient({ url }); // it has no intMode
      this.integer = (value) => Number(value);
    } else {
      this.db = original.createClient({ url: client.endsWith("ws") ? url.replace("http:", "ws:") : url, intMode: "bigint" });
    }
  }

  async rows(sql, args = []) {
    return (await this.db.execute({ sql, args })).rows.map((row) => Array.from(row));
  }

  async run(sql, args = []) {
    const result = await this.db.execute({ sql, args });
    return { changes: result.rowsAffected, lastId: result.lastInsertRowid };
  }

  async batchOf(statements) {
    await this.db.batch(statements, "write");
  }

  async script(sql) {
    await this.db.executeMultiple(sql);
  }

  async transaction() {
    const transaction = await this.db.transaction("write");
    return {
      run: (sql, args = []) => transaction.execute({ sql, args }),
      rows: async (sql, args = []) => (await transaction.execute({ sql, args })).rows.map((row) => Array.from(row)),
      commit: () => transaction.commit(),
      rollback: () => transaction.rollback(),
    };
  }

  another() {
    return new Libsql(this.client, this.url);
  }

  close() {
    this.db.close();
  }
}

await main((client, url) => new Libsql(client, url));
