// The fake's side of the contract: calls and streams around the queue. Decides nothing about a message.

import { EventEmitter } from "node:events";

import {
  Metadata,
  status,
  type sendUnaryData,
  type ServerDuplexStream,
  type ServerUnaryCall,
} from "@grpc/grpc-js";

import {
  AckResponse,
  ConsumeResponse,
  EmptyReason,
  ExtendResponse,
  FetchResponse,
  GiveBackResponse,
  NakResponse,
  SettleResponse,
  TermResponse,
  type AckRequest,
  type ConsumeRequest,
  type ExtendRequest,
  type FetchRequest,
  type FetchServiceServer,
  type GiveBackRequest,
  type NakRequest,
  type SettleRequest,
  type SettleResult,
  type Settlement,
  type TermRequest,
} from "../gen/fetchproxy/v1/fetch.js";
import { REASONS } from "../reasons.js";
import { LONGEST_TIMER, millis } from "../time.js";
import { failure, HURRY, type Lease, type Queue } from "./queue.js";
import { FakeStream } from "./stream.js";

/** The default of the contract, in bytes. */
const MAX_BYTES = (4 << 20) - 1_024;

type Waiter = () => boolean;

export class Service {
  /** Emits `changed` when something has happened to a message. */
  readonly events = new EventEmitter();
  /** Reasons of the next calls, by method. */
  readonly failures = new Map<string, string[]>();
  /** Reasons of the next settlements, in whatever call they come. */
  readonly settlementFailures: string[] = [];
  /** Open Fetch calls. Each says whether it is answered. */
  readonly #waiters = new Set<Waiter>();
  readonly #streams = new Set<FakeStream>();
  readonly #attempts = new Map<string, Lease[] | "over">();
  #timer?: NodeJS.Timeout;

  constructor(private readonly queue: Queue) {
    this.events.setMaxListeners(0);
  }

  /** The methods, for a server. */
  readonly methods = {
    fetch: this.#unary("Fetch", (call, request: FetchRequest) => this.#fetch(call, request)),
    ack: this.#unary("Ack", async (_, { token }: AckRequest) => {
      const { outcome } = this.#settleOne(token, { $case: "ack", value: {} });
      return AckResponse.create({ outcome });
    }),
    nak: this.#unary("Nak", async (_, { token, delay }: NakRequest) => {
      const { outcome } = this.#settleOne(token, { $case: "nak", value: { delay } });
      return NakResponse.create({ outcome });
    }),
    term: this.#unary("Term", async (_, { token, reason }: TermRequest) => {
      const { outcome } = this.#settleOne(token, { $case: "term", value: { reason } });
      return TermResponse.create({ outcome });
    }),
    extend: this.#unary("Extend", async (_, { token, lease: length }: ExtendRequest) => {
      const { lease } = this.#settleOne(token, { $case: "extend", value: { lease: length } });
      return ExtendResponse.create({ lease });
    }),
    settle: this.#unary("Settle", async (_, { settlements }: SettleRequest) => {
      const results = settlements.map((part) => this.settle(part));
      this.changed();
      const failed = results.filter(({ error }) => error).length;
      return SettleResponse.create({ results, failed });
    }),
    giveBack: this.#unary("GiveBack", async (_, { attemptId }: GiveBackRequest) => {
      const known = this.#attempts.get(attemptId);
      const leases = Array.isArray(known) ? known.filter(({ end }) => !end) : [];
      this.#attempts.set(attemptId, "over");
      leases.forEach((lease) => this.queue.release(lease));
      this.changed();
      return GiveBackResponse.create({ messages: leases.length });
    }),
    getConsumer: this.#unary("GetConsumer", async () => {
      throw refusal("UNSUPPORTED");
    }),
    consume: (call: ServerDuplexStream<ConsumeRequest, ConsumeResponse>) => {
      const reason = this.failures.get("Consume")?.shift();
      if (reason) return void call.emit("error", refusal(reason));
      this.#streams.add(new FakeStream(call, this.queue, this));
    },
  } satisfies FetchServiceServer;

  /** Something has happened: messages go to those who wait for messages. */
  changed(): void {
    const over = this.queue.lapse(performance.now());
    for (const stream of this.#streams) stream.lapsed(over);
    for (const waiter of this.#waiters) if (waiter()) this.#waiters.delete(waiter);
    for (const stream of this.#streams) stream.deliver();
    clearTimeout(this.#timer);
    const next = this.queue.nextLapse() - performance.now();
    if (Number.isFinite(next))
      this.#timer = setTimeout(() => this.changed(), Math.min(Math.max(next, 1), LONGEST_TIMER));
    this.events.emit("changed");
  }

  settle({ token, action }: Settlement, delivered?: Lease): SettleResult {
    const reason = action?.$case !== "extend" && this.settlementFailures.shift();
    if (reason) return failure(reason, "the test says so");
    return this.queue.settle(delivered ?? this.queue.leaseOf(token), action, performance.now());
  }

  left(stream: FakeStream): void {
    this.#streams.delete(stream);
    this.changed();
  }

  close(): void {
    clearTimeout(this.#timer);
  }

  #settleOne(token: string, action: Settlement["action"]): SettleResult {
    const result = this.settle({ token, action, number: 0 });
    this.changed();
    if (result.error) throw refusal(result.error.reason, result.error.message);
    return result;
  }

  async #fetch(
    call: { on(event: "cancelled", listener: () => void): unknown },
    request: FetchRequest,
  ) {
    const { attemptId } = request;
    const known = attemptId ? this.#attempts.get(attemptId) : undefined;
    if (known) {
      const leases = known === "over" ? [] : known.filter(({ end }) => !end);
      return this.#answer(request, leases, EmptyReason.EMPTY_REASON_ATTEMPT_OVER);
    }
    const none = EmptyReason.EMPTY_REASON_NO_MESSAGES;
    const wait = request.maxWait ? millis(request.maxWait) : 30_000;
    return new Promise<FetchResponse>((resolve) => {
      const waiter = () => {
        if (!this.queue.hasReady) return false;
        clearTimeout(timer);
        resolve(this.#answer(request, undefined, none));
        return true;
      };
      const leave = () => {
        clearTimeout(timer);
        this.#waiters.delete(waiter);
        resolve(FetchResponse.create({ emptyReason: none }));
      };
      const timer = setTimeout(leave, wait);
      call.on("cancelled", leave);
      this.#waiters.add(waiter);
      this.changed();
    });
  }

  /** With messages of the queue, or with those that the attempt has. */
  #answer(request: FetchRequest, again: Lease[] | undefined, ifEmpty: EmptyReason): FetchResponse {
    const { queue } = this;
    const { n, codec, maxBytes, lease } = request;
    const now = performance.now();
    const answer = FetchResponse.create();
    const leases: Lease[] = again ?? [];
    if (!again) {
      while (leases.length + answer.rejected.length < Math.max(n, 1)) {
        const taken = queue.take(now, lease && millis(lease), codec);
        if (!taken) break;
        if ("cause" in taken) answer.rejected.push(taken);
        else leases.push(taken);
      }
    }
    for (const one of leases) {
      const most = maxBytes || MAX_BYTES;
      if (one.record.payload.length > most)
        answer.rejected.push(queue.rejectedAsTooLarge(one, most));
      else answer.messages.push(queue.delivery(one, now, codec));
    }
    if (request.attemptId) this.#attempts.set(request.attemptId, leases);
    const isRejected = answer.rejected.length > 0;
    if (answer.messages.length === 0)
      answer.emptyReason = isRejected ? EmptyReason.EMPTY_REASON_REJECTED : ifEmpty;
    return answer;
  }

  /** A method that answers once, and may be told to fail. */
  #unary<Request, Answer>(
    method: string,
    answer: (call: ServerUnaryCall<Request, Answer>, request: Request) => Promise<Answer>,
  ) {
    return async (call: ServerUnaryCall<Request, Answer>, reply: sendUnaryData<Answer>) => {
      try {
        const reason = this.failures.get(method)?.shift();
        if (reason) throw refusal(reason);
        reply(null, await answer(call, call.request));
      } catch (error) {
        reply(error as object);
      }
    };
  }
}

/** A status as the proxy makes it. */
function refusal(reason: string, details = "the test says so") {
  const metadata = new Metadata();
  metadata.set("fetchproxy-reason", reason);
  if (failure(reason, details).error?.retryDelay)
    metadata.set("grpc-retry-pushback-ms", String(HURRY));
  return { code: REASONS.get(reason) ?? status.UNKNOWN, details, metadata };
}
