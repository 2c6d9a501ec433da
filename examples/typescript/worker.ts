// The worker loop: fetch a batch, handle its messages one after the other, settle each.
//
// Put your own work into handle, at the end; it need know nothing of leases. To work on more
// messages at a time, start more workers.

import { setTimeout as sleep } from "node:timers/promises";

import {
  duration,
  FetchProxy,
  MAX_BYTES,
  Poison,
  Transient,
  type Batch,
  type Lease,
} from "./fetchproxy.js";
import { Codec, FetchRequest, type Delivery } from "./gen/fetchproxy/v1/fetch.js";

/** How long an outcome may wait for others of its batch, to be settled with them; milliseconds. */
const GATHER = 100;

async function main(): Promise<void> {
  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"]) process.once(signal, () => stop.abort());

  const { FETCH_PROXY_ADDR, STREAM, CONSUMER, BATCH, MAX_WAIT } = process.env;
  if (!STREAM || !CONSUMER) throw new Error("STREAM and CONSUMER must be set");
  const request = FetchRequest.create({
    stream: STREAM,
    consumer: CONSUMER,
    n: Number(BATCH ?? 10),
    maxWait: duration(Number(MAX_WAIT ?? 10) * 1_000),
    maxBytes: MAX_BYTES,
    codec: Codec.CODEC_JSON,
    worker: "examples/typescript",
  });
  const onRetry = (reason: string, wait: number) => say({ event: "retry", reason, in: wait });
  const proxy = new FetchProxy(FETCH_PROXY_ADDR ?? "127.0.0.1:50051", onRetry);

  say({ event: "ready" });
  for await (const { messages, rejected } of proxy.fetch(request, stop.signal)) {
    for (const message of rejected) {
      console.error(`message ${message.streamSequence} rejected: ${message.detail}`);
      say({ event: "rejected", ...about(message), id: null });
      await proxy.refuse(message);
    }
    await workThrough(proxy.hold(messages), stop.signal);
  }
  proxy.close();
  say({ event: "stopped" });
}

/** Handles and settles the messages of a batch. Once told to stop, it begins no other. */
async function workThrough(batch: Batch, stop: AbortSignal): Promise<void> {
  try {
    for (const lease of batch.leases) {
      if (stop.aborted) lease.giveBack();
      else if (!lease.lost) await work(lease);
      if (batch.waited > GATHER) report(await batch.settle());
    }
    report(await batch.settle());
  } finally {
    batch.release();
  }
}

/** Works on a message, and decides by how that ended what is to become of it. */
async function work(lease: Lease): Promise<void> {
  try {
    await handle(lease.message, lease.signal);
    lease.ack();
  } catch (error) {
    if (error instanceof Transient) return lease.nak(error.delay);
    if (error instanceof Poison) return lease.term(error.message);
    console.error(`message ${lease.message.streamSequence}:`, error);
    lease.nak(5);
  }
}

/** The work itself. Its signal aborts when the message may have been given to another worker. */
async function handle(message: Delivery, signal: AbortSignal): Promise<void> {
  const task = taskIn(message);
  switch (task?.do) {
    case "ok":
    case "headers":
      return;
    case "fail":
      if (message.deliveryCount <= task.times) throw new Transient(task.delay);
      return;
    case "slow":
      await sleep(task.seconds * 1_000, undefined, { signal });
      return;
    case "poison":
      throw new Poison("the task says so");
    default:
      throw new Poison("not a task");
  }
}

/** A task says what is to be done with it. */
type Task = { id?: unknown } & (
  | { do: "ok" | "headers" | "poison" }
  | { do: "fail"; times: number; delay: number }
  | { do: "slow"; seconds: number }
);

function taskIn({ payload }: Delivery): Task | null {
  return payload?.$case === "text" ? JSON.parse(payload.value) : null;
}

/** Tells how the settling of messages ended. */
function report(settled: Lease[]): void {
  for (const { message, outcome } of settled) {
    const task = taskIn(message);
    const line = { event: outcome, ...about(message), id: task?.id ?? null };
    const withHeaders = task?.do === "headers" && outcome === "acked";
    say(withHeaders ? { ...line, headers: headersOf(message) } : line);
  }
}

function about({
  streamSequence,
  deliveryCount,
}: {
  streamSequence: number;
  deliveryCount: number;
}) {
  return { sequence: streamSequence, deliveries: deliveryCount };
}

function headersOf({ headers }: Delivery): Record<string, string[]> {
  const pairs = Object.entries(headers).map(([name, { values }]) => [name, values] as const);
  return Object.fromEntries(pairs);
}

/** Standard output has one JSON object a line. */
function say(line: object): void {
  process.stdout.write(JSON.stringify(line) + "\n");
}

await main().catch((error: Error) => {
  console.error(`worker: ${error.message}`);
  process.exit(1);
});
