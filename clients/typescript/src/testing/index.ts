// The fake proxy as a test uses it.

import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";

import { Server, ServerCredentials } from "@grpc/grpc-js";

import { Client } from "../client.js";
import { FetchServiceService } from "../gen/fetchproxy/v1/fetch.js";
import { REASONS } from "../reasons.js";
import type { Worker } from "../worker.js";
import { Queue, type FakeRecord } from "./queue.js";
import { Service } from "./service.js";

export type { FakeRecord, Settled } from "./queue.js";

/** The methods of the contract that a test can let fail. */
export type Method =
  "Fetch" | "Settle" | "Ack" | "Nak" | "Term" | "Extend" | "GiveBack" | "Consume";

export interface FakeOptions {
  /** The number of attempts after which a message ends. 0, unless set: no limit. */
  maxDeliver?: number;
  /** The lease of a Fetch without a length, in milliseconds. 30 s unless set. */
  ackWait?: number;
}

/**
 * A proxy in memory with one stream and one consumer, whatever a worker calls them. It speaks the contract on a
 * free port of this machine.
 */
export class FakeProxy {
  readonly #queue: Queue;
  readonly #service: Service;
  readonly #server = new Server({ "grpc.max_receive_message_length": 4 << 20 });
  #client?: Client;

  private constructor({ maxDeliver = 0, ackWait = 30_000 }: FakeOptions) {
    this.#queue = new Queue(maxDeliver, ackWait);
    this.#service = new Service(this.#queue);
  }

  static async start(options: FakeOptions = {}): Promise<FakeProxy> {
    const fake = new FakeProxy(options);
    fake.#server.addService(FetchServiceService, fake.#service.methods);
    const address = "127.0.0.1:0";
    const port = await new Promise<number>((resolve, reject) =>
      fake.#server.bindAsync(address, ServerCredentials.createInsecure(), (error, bound) =>
        error ? reject(error) : resolve(bound),
      ),
    );
    fake.#client = new Client(`127.0.0.1:${port}`);
    return fake;
  }

  /** A client of the fake. */
  get client(): Client {
    return this.#client!;
  }

  /** All messages, in the order of the stream. */
  get messages(): readonly FakeRecord[] {
    return this.#queue.records;
  }

  /** Adds a message. Bytes and text are taken as they are, and everything else becomes JSON. */
  publish(
    payload: unknown,
    subject = "tasks",
    headers: { [name: string]: string | string[] } = {},
  ): FakeRecord {
    const isRaw = typeof payload === "string" || payload instanceof Uint8Array;
    const bytes = Buffer.from(isRaw ? (payload as string) : JSON.stringify(payload));
    const values = Object.entries(headers).map(
      ([name, value]) => [name, [value].flat()] as [string, string[]],
    );
    const record = this.#queue.publish(bytes, subject, new Map(values));
    this.#service.changed();
    return record;
  }

  /** Ends the lease of a message, as if another worker had it. It is delivered again. */
  expire(record: FakeRecord): void {
    this.#queue.expire(record);
    this.#service.changed();
  }

  /** The next call of the method fails. */
  fail(method: Method, reason: string): void {
    const { failures } = this.#service;
    failures.set(method, [...(failures.get(method) ?? []), known(reason)]);
  }

  /** The next Ack, Nak or Term fails, in whatever call it comes. */
  failSettlement(reason: string): void {
    this.#service.settlementFailures.push(known(reason));
  }

  /**
   * Waits until every message has ended.
   *
   * @throws Error after `within` milliseconds
   */
  async settled(within = 10_000): Promise<void> {
    const signal = AbortSignal.timeout(within);
    while (!this.#queue.isIdle) {
      await once(this.#service.events, "changed", { signal }).catch(() => {
        const left = this.messages.filter(({ ended }) => !ended);
        const numbers = left.map(({ sequence }) => sequence).join(", ");
        throw new Error(`after ${within} ms these messages have not ended: ${numbers}`);
      });
    }
  }

  /**
   * Runs the worker until every message has ended, then stops it.
   *
   * @throws what `run` of the worker throws, and an Error after `within` milliseconds
   */
  async run(worker: Worker<any>, within = 10_000): Promise<void> {
    const running = worker.run();
    try {
      await Promise.race([running, this.settled(within)]);
    } finally {
      worker.stop();
      // A handler that hangs must not hang the test.
      const late = sleep(within, undefined, { ref: false }).then(() => worker.stop());
      await Promise.race([running, late.then(() => running)]);
    }
  }

  /** Ends all calls. */
  async close(): Promise<void> {
    this.#service.close();
    this.client.close();
    this.#server.forceShutdown();
  }
}

function known(reason: string): string {
  if (!REASONS.has(reason)) throw new RangeError(`${reason} is no reason of the proxy`);
  return reason;
}
