// A worker. With Fetch, it takes a batch, and works on one message after the other. With Consume, if
// CONCURRENCY is set, it works on up to so many messages at once, as they come. It logs the outcome
// of each. Copy it, and put your work into `handle`.

import { setTimeout as sleep } from "node:timers/promises";

import { consume } from "./consume.js";
import {
  Batch,
  duration,
  FetchProxy,
  fetchSome,
  MAX_BYTES,
  Poison,
  say,
  Transient,
} from "./fetchproxy.js";
import { Codec, ConsumeStart, FetchRequest, type Delivery } from "./gen/fetchproxy/v1/fetch.js";

/** The task of a message. */
type Task =
  | { do: "ok" | "headers" | "poison" }
  | { do: "fail"; times: number; delay: number }
  | { do: "slow"; seconds: number };

/**
 * The work. Its result goes to the log line when the message is acked. An error also decides the
 * outcome: see Transient and Poison. The signal aborts when another worker may have received the
 * message.
 */
async function handle(message: Delivery, signal: AbortSignal): Promise<object | void> {
  const task = taskIn(message);
  switch (task?.do) {
    case "ok":
      return;
    case "headers":
      return { headers: headersOf(message) };
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

function taskIn({ payload }: Delivery): Task | null {
  try {
    // No payload: a tombstone or a consumer of headers only. There is nothing to do.
    if (payload?.value.length === 0) return { do: "ok" };
    return payload?.$case === "text" ? JSON.parse(payload.value) : null;
  } catch (error) {
    throw new Poison(`not a task: ${error}`);
  }
}

function headersOf({ headers }: Delivery): Record<string, string[]> {
  return Object.fromEntries(Object.entries(headers).map(([name, { values }]) => [name, values]));
}

async function main(): Promise<void> {
  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"]) process.on(signal, () => stop.abort());

  const { FETCH_PROXY_ADDR, STREAM, CONSUMER, BATCH, MAX_WAIT, CONCURRENCY, GRACE } = process.env;
  if (!STREAM || !CONSUMER) throw new Error("STREAM and CONSUMER must be set");
  const source = {
    stream: STREAM,
    consumer: CONSUMER,
    codec: Codec.CODEC_JSON,
    worker: "examples/typescript",
  };
  const proxy = new FetchProxy(FETCH_PROXY_ADDR ?? "127.0.0.1:50051");

  say({ event: "ready" });
  if (CONCURRENCY) {
    const credit = { maxLeases: Number(CONCURRENCY) };
    const start = ConsumeStart.create({ credit, maxFrameBytes: MAX_BYTES, ...source });
    await consume(proxy, start, Number(GRACE ?? 10) * 1_000, handle, stop.signal);
  } else {
    const n = Number(BATCH ?? 10);
    const maxWait = duration(Number(MAX_WAIT ?? 10) * 1_000);
    const request = FetchRequest.create({ n, maxWait, maxBytes: MAX_BYTES, ...source });
    await fetchLoop(proxy, request, stop.signal);
  }
  proxy.close();
  say({ event: "stopped" });
}

async function fetchLoop(proxy: FetchProxy, request: FetchRequest, stop: AbortSignal) {
  for (;;) {
    const answer = await fetchSome(proxy, request, stop);
    if (!answer) break;
    const batch = new Batch(proxy, answer, stop);
    for (const lease of batch.leases) await batch.work(lease, handle);
    await batch.gone;
  }
}

await main().catch((error: Error) => {
  console.error(`worker: ${error.message}`);
  process.exit(1);
});
