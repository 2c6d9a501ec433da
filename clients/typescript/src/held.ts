// A message in hand: it waits for a place, a handler works on it, and its outcome is settled or it is lost. The
// loops say when it is settled and until when it is leased.

import { status } from "@grpc/grpc-js";

import { FetchProxyError } from "./errors.js";
import type { OnEvent } from "./events.js";
import type { Decoder, Message } from "./message.js";
import { ACKED, failed, nacked, Nak, RETURNED, Term, termed, type Outcome } from "./outcome.js";

/**
 * The work on a message. The signal aborts when the lease is lost, and then the result is dropped. A result that
 * is a Nak or a Term decides the outcome, as if it was thrown.
 */
export type Handler<T> = (message: Message<T>, signal: AbortSignal) => unknown;

/** Makes a span around each handler. `fetchproxy/otel` has it for OpenTelemetry. */
export interface Tracer {
  trace(
    message: Message,
    source: { stream: string; consumer: string },
    handle: () => Promise<unknown>,
  ): Promise<unknown>;
}

/** The work of a worker, and its limits. */
export interface Job {
  readonly stream: string;
  readonly consumer: string;
  readonly handler: Handler<never>;
  readonly decoder: Decoder;
  readonly tracer?: Tracer;
  /** The longest time that a lease is kept for a handler, in milliseconds. */
  readonly atMost: number;
  readonly places: Places;
  emit: OnEvent;
}

/** The places of handlers. A handler keeps its place until it returns, also if its lease is lost. */
export class Places {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(readonly all: number) {
    this.#free = all;
  }

  get free(): number {
    return this.#free;
  }

  async take(): Promise<void> {
    if (this.#free > 0) this.#free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }

  /** The next handler begins in a turn of its own, so that leases are kept while handlers never wait. */
  release(): void {
    const next = this.#waiting.shift();
    if (next) setImmediate(next);
    else this.#free++;
  }
}

export abstract class Held {
  /** Undecided while it waits or a handler works on it. */
  outcome?: Outcome;
  /** Settled or lost. */
  isGone = false;
  /** A handler has it, and has not returned. */
  isHandled = false;
  #isBegun = false;
  readonly #cancelled = new AbortController();
  readonly #began = performance.now();

  constructor(
    protected readonly job: Job,
    /** Undefined: it came rejected, and was told of already. */
    readonly message: Message | undefined,
  ) {}

  /** The time after which the lease is not kept for its handler, on the clock of `performance`. */
  get latest(): number {
    return this.#began + this.job.atMost;
  }

  /** Waits for a place, and runs the handler. Never fails. */
  async work(message: Message): Promise<void> {
    const { places } = this.job;
    await places.take();
    if (this.isThere()) {
      [this.#isBegun, this.isHandled] = [true, true];
      const outcome = await this.#outcomeOf(message);
      this.isHandled = false;
      if (outcome && this.isThere()) this.decide(outcome);
    }
    places.release();
    this.freed();
  }

  decide(outcome: Outcome): void {
    if (this.isGone || this.outcome) return;
    this.outcome = outcome;
    this.decided();
  }

  /** Only if no handler has begun it. A Nak of the last attempt would end the message. */
  giveBackIfWaiting(): void {
    if (!this.#isBegun && !this.message?.isLastAttempt) this.decide(RETURNED);
  }

  /** Cancels the handler, too. */
  giveBackByForce(): void {
    if (this.outcome || this.isGone) return;
    const stopped = new FetchProxyError("CANCELLED", status.CANCELLED, "the worker was stopped");
    if (this.message?.isLastAttempt) return this.lose(stopped);
    this.#cancelled.abort(stopped);
    this.decide(RETURNED);
  }

  lose(error: FetchProxyError): void {
    if (this.isGone) return;
    this.#leave();
    this.#cancelled.abort(error);
    const { message } = this;
    if (message) this.job.emit({ name: "lost", message, reason: error.reason, error });
  }

  /** The outcome is confirmed. */
  settled(): void {
    if (this.isGone || !this.outcome) return;
    this.#leave();
    if (this.message && this.outcome.event) this.job.emit(this.outcome.event(this.message));
  }

  /** Whether its handler may begin or settle it. */
  protected isThere(): boolean {
    return !this.isGone && !this.outcome;
  }

  /** It has an outcome now. */
  protected abstract decided(): void;
  /** It is settled or lost now. */
  protected abstract left(): void;
  /** Its place is free now. */
  protected abstract freed(): void;

  #leave(): void {
    this.isGone = true;
    this.left();
  }

  /** Undefined: the handler was cancelled, and nobody wants its outcome. */
  async #outcomeOf(message: Message): Promise<Outcome | undefined> {
    const { decoder, handler, tracer } = this.job;
    const { signal } = this.#cancelled;
    try {
      if (message.hasPayload) Object.assign(message, { data: await decoder.decode(message) });
    } catch (error) {
      return termed(`the payload cannot be decoded: ${messageOf(error)}`);
    }
    if (signal.aborted) return undefined;
    const handle = async () => handler(message as Message<never>, signal);
    try {
      const result = await (tracer ? tracer.trace(message, this.job, handle) : handle());
      return meant(result) ?? ACKED;
    } catch (error) {
      if (signal.aborted) return undefined;
      const outcome = meant(error);
      if (!outcome) this.job.emit({ name: "handler_error", message, error });
      return outcome ?? failed(message);
    }
  }
}

function meant(result: unknown): Outcome | undefined {
  if (result instanceof Nak) return nacked(result.delay);
  if (result instanceof Term) return termed(result.reason);
  return undefined;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
