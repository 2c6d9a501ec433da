// The worker of the conformance suite: it knows the tasks of `examples/conformance.json`, and prints a JSON line for
// each event. With CONCURRENCY, it works by Consume on so many messages at once. Otherwise, it works by Fetch on one
// message after the other.

import { setTimeout as sleep } from "node:timers/promises";

import { Client, logEvent, Nak, Term, Worker, type Message, type WorkerEvent } from "fetchproxy";

/** The task of a message. */
type Task =
  | { do: "ok" | "headers" | "poison" }
  | { do: "fail"; times: number; delay: number }
  | { do: "slow"; seconds: number };

async function handle(message: Message<Task | null | undefined>, signal: AbortSignal) {
  // No payload: a tombstone, or a consumer of headers only. There is nothing to do.
  const task = message.data === undefined ? { do: "ok" as const } : message.data;
  switch (task?.do) {
    case "ok":
    case "headers":
      return;
    case "fail":
      if (message.deliveryCount <= task.times) throw new Nak(task.delay * 1_000);
      return;
    case "slow":
      await sleep(task.seconds * 1_000, undefined, { signal });
      return;
    case "poison":
      throw new Term("the task says so");
    default:
      throw new Term("not a task");
  }
}

function tell(event: WorkerEvent): void {
  logEvent(event);
  const { name } = event;
  switch (name) {
    case "ready":
    case "stopped":
      return say({ event: name });
    case "retry":
      return say({
        event: name,
        reason: event.reason,
        detail: event.detail,
        in: event.wait / 1_000,
      });
    case "rejected": {
      const { streamSequence: sequence, deliveryCount: deliveries } = event.rejected;
      return say({ event: name, sequence, deliveries, id: null });
    }
    case "handler_error":
      return; // The line of the Nak follows.
    default: {
      const { streamSequence: sequence, deliveryCount: deliveries, headers } = event.message;
      const { id = null, ...task } = Object(contentOf(event.message));
      const told = task.do === "headers" ? { headers: Object.fromEntries(headers) } : {};
      return say({ event: name, sequence, deliveries, id, ...told });
    }
  }
}

/** A message that no handler had is not decoded. */
function contentOf({ payload }: Message): unknown {
  return payload.length > 0 ? JSON.parse(payload.toString()) : undefined;
}

function say(line: object): void {
  process.stdout.write(JSON.stringify(line) + "\n");
}

async function main(): Promise<void> {
  const { STREAM, CONSUMER, BATCH, MAX_WAIT, CONCURRENCY, GRACE } = process.env;
  if (!STREAM || !CONSUMER) throw new Error("STREAM and CONSUMER must be set");
  const client = Client.fromEnv();
  const byConsume = {
    mode: "consume" as const,
    concurrency: Number(CONCURRENCY),
    grace: Number(GRACE ?? 10) * 1_000,
  };
  const byFetch = {
    mode: "fetch" as const,
    concurrency: 1,
    batch: Number(BATCH ?? 10),
    maxWait: Number(MAX_WAIT ?? 10) * 1_000,
  };
  const worker = new Worker(client, STREAM, CONSUMER, handle, {
    ...(CONCURRENCY ? byConsume : byFetch),
    onEvent: tell,
  });
  await worker.run({ signals: true });
  client.close();
}

await main().catch((error: Error) => {
  console.error(`worker: ${error}`);
  process.exit(1);
});
