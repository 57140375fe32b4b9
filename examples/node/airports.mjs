// The unmodified libSQL client for JavaScript on a walship cluster: write a visit, read it back, ask for a country.
//   node airports.mjs http://127.0.0.1:8080        (after examples/airports.py has loaded the airports)
import { createClient } from "@libsql/client";

const url = process.argv[2] ?? "http://127.0.0.1:8080";
const client = createClient({ url });

const airports = await client.execute("SELECT count(*) AS count FROM airports");
console.log(`${airports.rows[0].count} airports at ${url}`);

// One transaction; a second request reads what it wrote. The run is named by time, so the example can be run again.
const run = `node-${Date.now()}`;
const visits = [1, 2, 3];
await client.batch(
  visits.map((number) => ({
    sql: "INSERT INTO visits (run, number, icao, passengers) SELECT ?, ?, icao, 100 FROM airports ORDER BY icao LIMIT 1",
    args: [run, number],
  })),
  "write",
);
const found = await client.execute({ sql: "SELECT number FROM visits WHERE run = ? ORDER BY number", args: [run] });
const numbers = found.rows.map((row) => row.number);
console.log(`visits written ${visits}, read back ${numbers}`);

const highest = await client.execute(
  "SELECT icao, name, country, elevation FROM airports ORDER BY elevation DESC LIMIT 3",
);
console.table(highest.rows.map((row) => ({ ...row })));
client.close();
process.exitCode = String(numbers) === String(visits) ? 0 : 1;
