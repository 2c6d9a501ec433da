// Does the work of one mode for each line that it reads, for the bench that compares native clients.
//
// A line is: MODE CONSUMER WORKERS MESSAGES. The answer is: done COUNT. All workers of a kind share one connection.

import { createInterface } from "node:readline";

import { credentials, type ServiceError } from "@grpc/grpc-js";
import { jetstream } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";
import { Client, Worker } from "fetchproxy";

import {
  AckRequest,
  type AckResponse,
  FetchRequest,
  type FetchResponse,
  FetchServiceClient,
  SettleRequest,
  type SettleResponse,
} from "./gen/fetchproxy/v1/fetch.js";

const stream = process.env["STREAM"] ?? "";
const wait = { seconds: 1, nanos: 0 };
const nats = await connect({ servers: process.env["NATS_URL"] ?? "" });
const js = jetstream(nats);
const client = new FetchServiceClient(
  process.env["FETCH_PROXY_ADDR"] ?? "",
  credentials.createInsecure(),
);

const packageClient = new Client(process.env["FETCH_PROXY_ADDR"] ?? "");

/** Makes a call, and waits for its answer. */
function call<A>(start: (then: (error: ServiceError | null, answer: A) => void) => unknown) {
  return new Promise<A>((resolve, reject) => {
    start((error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

/** Returns a round: fetches up to n messages and confirms each, all acks at once. */
async function native(consumer: string, n: number): Promise<() => Promise<number>> {
  const handle = await js.consumers.get(stream, consumer);
  return async () => {
    if (n === 1) {
      const message = await handle.next({ expires: 1000 });
      await message?.ackAck();
      return message ? 1 : 0;
    }
    const acks = [];
    for await (const message of await handle.fetch({ max_messages: n, expires: 1000 })) {
      acks.push(message.ackAck());
    }
    await Promise.all(acks);
    return acks.length;
  };
}

/** Returns a round. One message is acked by an Ack, more by a Settle. */
function proxied(consumer: string, n: number): () => Promise<number> {
  const request = FetchRequest.fromPartial({ stream, consumer, n, maxWait: wait });
  return async () => {
    const { messages } = await call<FetchResponse>((then) => client.fetch(request, then));
    if (n === 1) {
      for (const { token } of messages) {
        const ack = AckRequest.fromPartial({ token });
        await call<AckResponse>((then) => client.ack(ack, then));
      }
    } else if (messages.length > 0) {
      const settlements = messages.map(({ token }) => ({
        token,
        action: { $case: "ack" as const, value: {} },
      }));
      const settle = SettleRequest.fromPartial({ settlements });
      const settled = await call<SettleResponse>((then) => client.settle(settle, then));
      if (settled.failed > 0) throw new Error(`${settled.failed} settlements failed`);
    }
    return messages.length;
  };
}

/** Runs a worker of the client package until so many messages are acked. Returns their number. */
async function packaged(consumer: string, concurrency: number, messages: number): Promise<number> {
  let done = 0;
  const handle = () => {
    done += 1;
    if (done === messages) worker.stop();
  };
  const options = { concurrency, decode: "bytes" as const };
  const worker = new Worker(packageClient, stream, consumer, handle, options);
  await worker.run();
  return done;
}

console.log("ready");
for await (const line of createInterface({ input: process.stdin })) {
  const [mode = "", consumer = "", workers, messages] = line.split(" ");
  const [kind, n] = mode.split("-");
  if (kind === "package") {
    console.log(`done ${await packaged(consumer, Number(n), Number(messages))}`);
    continue;
  }
  const make = kind === "native" ? native : proxied;
  const round = await make(consumer, Number(n));
  let done = 0;
  const worker = async () => {
    while (done < Number(messages)) {
      const count = await round();
      done += count;
    }
  };
  await Promise.all(Array.from({ length: Number(workers) }, worker));
  console.log(`done ${done}`);
}
client.close();
packageClient.close();
await nats.close();
