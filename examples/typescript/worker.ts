// A worker for the sample tasks of `fetch-proxy dev`. It handles up to 16 tasks at once.

import { Client, Nak, Term, Worker, type Message } from "fetchproxy";

type Task = { id: number; kind: string };

// The signal aborts when another worker may have received the task: give it to all that you wait for.
async function handle({ data: task, deliveryCount }: Message<Task>, signal: AbortSignal) {
  switch (task?.kind) {
    case "ok":
      break;
    case "flaky":
      if (deliveryCount === 1) throw new Nak(1_000); // It comes back after 1 s.
      break;
    default:
      throw new Term(`task ${task?.id} can never be done`); // It never comes back.
  }
  console.log(`task ${task.id} is done, by attempt ${deliveryCount}`);
}

const { STREAM = "TASKS", CONSUMER = "batch-worker" } = process.env;
const client = Client.fromEnv();
const worker = new Worker(client, STREAM, CONSUMER, handle, { concurrency: 16 });
await worker.run({ signals: true });
client.close();
