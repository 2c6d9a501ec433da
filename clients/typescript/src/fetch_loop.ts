// The loop with Fetch: a call for each batch, while the keeper settles the batch before it.

import { randomUUID } from "node:crypto";

import type { Connection } from "./connection.js";
import { backoff, errorOf } from "./errors.js";
import { FetchRequest, type FetchResponse } from "./gen/fetchproxy/v1/fetch.js";
import type { Job } from "./held.js";
import { Keeper, type Lease } from "./keeper.js";
import { Message, rejectedMessage } from "./message.js";
import { ofRejected } from "./outcome.js";
import type { Stop } from "./stop.js";
import { Alarm, duration, pause } from "./time.js";

/** A Fetch has this time in addition to its own wait, in milliseconds. */
const FETCH_MARGIN = 5_000;
/** An empty answer that comes at once is asked for again after this time, in milliseconds. */
const EMPTY_PAUSE = 500;
/** For an answer to the call that gives a Fetch back, in milliseconds. */
const GIVE_BACK_TIMEOUT = 1_000;

export interface FetchOptions {
  /** The name of the worker in the logs of the proxy. */
  readonly name: string;
  /** The most messages that wait or are handled. */
  readonly batch: number;
  /** In milliseconds. */
  readonly maxWait: number;
  /** In milliseconds. Undefined: the ack wait of the consumer. */
  readonly lease?: number;
  /** The most bytes of messages in hand. */
  readonly maxBytes: number;
  /** The most bytes of an answer. */
  readonly maxFrameBytes: number;
}

/**
 * Ends when `stop` was asked for and every message is gone.
 *
 * @throws FetchProxyError if the proxy refuses a Fetch, and a repeat would be refused, too.
 */
export async function fetchBatches(
  connection: Connection,
  job: Job,
  options: FetchOptions,
  stop: Stop,
): Promise<void> {
  await new FetchLoop(connection, job, options, stop).run();
}

class FetchLoop {
  readonly #changed = new Alarm();
  readonly #keeper: Keeper;
  /** The bytes of messages that wait or are handled. */
  #bytes = 0;

  constructor(
    private readonly connection: Connection,
    private readonly job: Job,
    private readonly options: FetchOptions,
    private readonly stop: Stop,
  ) {
    this.#keeper = new Keeper(connection, job, () => this.#changed.ring());
    stop.asked.addEventListener("abort", () => this.#stopping());
    stop.forced.addEventListener("abort", () => this.#forced());
  }

  async run(): Promise<void> {
    const kept = this.#keeper.keep();
    try {
      while (!this.stop.asked.aborted) {
        if (!this.#hasRoom()) await this.#changed.sleep(Infinity);
        else if (!(await this.#fetchSome())) break;
      }
    } finally {
      this.#keeper.over();
      await kept;
    }
  }

  /** If a place is free, no message waits for it. */
  #hasRoom(): boolean {
    return this.job.places.free > 0 && this.#bytes < this.options.maxBytes;
  }

  /**
   * Takes the next answer with messages. False if the worker must stop first. The repeats of a call have one
   * name, so they get the messages of an answer that was lost.
   */
  async #fetchSome(): Promise<boolean> {
    const { asked } = this.stop;
    let attempt = { attemptId: randomUUID(), attemptAgain: false };
    for (let tries = 0; !asked.aborted;) {
      const began = performance.now();
      let wait: number;
      try {
        const limits = { timeout: this.options.maxWait + FETCH_MARGIN, signal: asked };
        const answer = await this.connection.fetch({ ...this.#request(), ...attempt }, limits);
        if (this.#took(answer)) return true;
        // A draining proxy, for example, answers at once.
        wait = began + EMPTY_PAUSE - performance.now();
        tries = 0;
        attempt = { attemptId: randomUUID(), attemptAgain: false };
      } catch (failure) {
        if (asked.aborted) break;
        const error = errorOf(failure);
        if (!error.canRepeat) throw error;
        wait = backoff(error, tries++);
        this.job.emit({ name: "retry", reason: error.reason, detail: error.message, wait, error });
        attempt.attemptAgain = true;
      }
      await pause(wait, asked);
    }
    await this.#giveBack(attempt.attemptId);
    return false;
  }

  #request(): FetchRequest {
    const { stream, consumer, decoder, places, atMost } = this.job;
    const { name: worker, batch, maxWait, lease, maxFrameBytes: maxBytes } = this.options;
    // Handlers whose messages are lost have their places, too.
    const n = Math.max(batch - (places.all - places.free), 1);
    const length = lease === undefined ? undefined : duration(Math.min(lease, atMost));
    const wait = duration(maxWait);
    const { codec } = decoder;
    return FetchRequest.create({
      ...{ stream, consumer, n, codec, maxBytes, worker },
      ...{ maxWait: wait, lease: length },
    });
  }

  #took({ messages, rejected }: FetchResponse): boolean {
    for (const delivery of messages) {
      const message = new Message(delivery);
      const lease = this.#keeper.add(delivery, message);
      void this.#work(lease, message, delivery.payload?.value.length ?? 0);
      if (this.stop.asked.aborted) lease.giveBackIfWaiting();
    }
    for (const one of rejected) {
      const told = rejectedMessage(one);
      this.job.emit({ name: "rejected", rejected: told });
      if (told.token) this.#keeper.add(one).decide(ofRejected(told));
    }
    return messages.length + rejected.length > 0;
  }

  async #work(lease: Lease, message: Message, bytes: number): Promise<void> {
    this.#bytes += bytes;
    await lease.work(message);
    this.#bytes -= bytes;
    this.#changed.ring();
  }

  /** Without an answer, messages of the Fetch come back when their leases end. */
  async #giveBack(attemptId: string): Promise<void> {
    const { stream, consumer } = this.job;
    const request = { stream, consumer, attemptId };
    await this.connection.giveBack(request, { timeout: GIVE_BACK_TIMEOUT }).catch(() => undefined);
  }

  #stopping(): void {
    this.#changed.ring();
    for (const lease of this.#keeper) lease.giveBackIfWaiting();
  }

  #forced(): void {
    for (const lease of this.#keeper) lease.giveBackByForce();
  }
}
