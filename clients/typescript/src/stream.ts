// One call of Consume: its frames, its credit, and which message has which number on it. It opens no next stream.

import type { ClientDuplexStream } from "@grpc/grpc-js";

import { backoff, errorOf, errorOfPart, type FetchProxyError } from "./errors.js";
import {
  ConsumeRequest,
  Outcome as Effect,
  type ConsumeResponse,
  type ConsumeResult,
  type ConsumeStart,
  type Delivery,
  type Rejected,
  type Settlement,
} from "./gen/fetchproxy/v1/fetch.js";

/** A frame has at most 512 KiB: so many settlements by token with the longest reason are less. */
const MOST_SETTLEMENTS = 400;

/** A message on a stream. */
export interface Carried {
  readonly isGone: boolean;
  /** A settlement, or an Extend if there is no outcome. */
  part(stream: Stream): Settlement;
  /** An Extend of it is confirmed, or its settlement is. */
  done(isExtended: boolean): void;
  lose(error: FetchProxyError): void;
  /** Its stream is over, and this is the next. */
  moveTo(stream: Stream): void;
}

/** The loop, as its streams see it. */
export interface Owner {
  connect(): ClientDuplexStream<ConsumeRequest, ConsumeResponse>;
  /** The places that are left for new messages of a stream that has delivered so many which are not gone. */
  credit(delivered: number): number;
  readonly isStopping: boolean;
  arrived(delivery: Delivery, stream: Stream): Carried;
  /** Undefined: there is nothing to settle. */
  arrivedRejected(rejected: Rejected, stream: Stream): Carried | undefined;
  retry(error: FetchProxyError, wait: number): void;
  /** The proxy will end the stream: it is time for the next. */
  drains(stream: Stream): void;
  /** No frame will come. The next stream carries the rest. */
  ended(stream: Stream, carried: Iterable<Carried>): void;
}

export class Stream {
  isOver = false;
  /** The proxy has answered. */
  isServed = false;
  isDraining = false;
  /** Why it is over. Undefined: an orderly end. */
  refusal?: FetchProxyError;
  /** All that is settled or extended on this stream. */
  readonly #carried = new Set<Carried>();
  readonly #numbers = new Map<number, Carried>();
  readonly #numberOf = new Map<Carried, number>();
  /** For the next frame. */
  readonly #ready = new Set<Carried>();
  /** Without a result yet, by the id of the frame. */
  readonly #sent = new Map<number, Carried[]>();
  #call?: ClientDuplexStream<ConsumeRequest, ConsumeResponse>;
  #lastId = 0;
  #heard = 0;
  #failed = 0;
  #isWoken = false;
  #credit = 0;
  #creditId = 0;
  /** The id of the credit after which no message comes. */
  #pauseId?: number;
  #isPaused = false;

  constructor(private readonly owner: Owner) {}

  open(start: ConsumeStart): void {
    this.#heard = performance.now();
    try {
      this.#call = this.owner.connect();
    } catch (error) {
      return this.#end(errorOf(error));
    }
    this.#call.on("data", (frame: ConsumeResponse) => this.#take(frame));
    this.#call.on("error", (error) => this.#end(errorOf(error)));
    this.#call.on("end", () => this.#end());
    this.#call.on("drain", () => this.wake());
    this.#credit = start.credit?.maxLeases ?? 0;
    this.#write(start);
  }

  cancel(): void {
    this.#call?.cancel();
  }

  /** The number of a message that this stream has delivered, or 0. */
  numberOf(carried: Carried): number {
    return this.#numberOf.get(carried) ?? 0;
  }

  /** Settles or extends it in the next frame. */
  send(carried: Carried): void {
    this.#carried.add(carried);
    this.#ready.add(carried);
    this.wake();
  }

  /** It is settled or lost. */
  drop(carried: Carried): void {
    this.#carried.delete(carried);
    this.#ready.delete(carried);
    const number = this.#numberOf.get(carried);
    if (number !== undefined) this.#numbers.delete(number);
    this.#numberOf.delete(carried);
    this.wake();
  }

  /** Looks for what there is to say, before the event loop goes on. Then all of it goes into one frame. */
  wake(): void {
    if (this.#isWoken || !this.#call) return;
    this.#isWoken = true;
    setImmediate(() => {
      this.#isWoken = false;
      const isDue = this.#ready.size > 0 || this.#creditNow() !== this.#credit;
      if ((isDue || this.owner.isStopping) && this.#isWritable()) this.#write();
    });
  }

  /** Says that this worker lives. Gives the stream up after so long without a frame, in milliseconds. */
  beat(longestSilence: number): void {
    if (performance.now() - this.#heard > longestSilence) this.cancel();
    else if (this.#isWritable()) this.#write();
  }

  #isWritable(): boolean {
    return !!this.#call?.writable && !this.#call.writableNeedDrain;
  }

  #creditNow(): number {
    return this.isDraining ? this.#credit : this.owner.credit(this.#numbers.size);
  }

  /** Sends all that is there to say: if nothing, a sign of life. */
  #write(start?: ConsumeStart): void {
    const frame = ConsumeRequest.create({ start });
    const credit = this.owner.isStopping ? 0 : this.#creditNow();
    const isPausing = this.owner.isStopping && this.#pauseId === undefined;
    if (credit !== this.#credit || isPausing) {
      frame.credit = { id: ++this.#creditId, maxLeases: credit, maxBytes: undefined };
      this.#credit = credit;
      if (isPausing) this.#pauseId = this.#creditId;
    }
    const parts = [...this.#ready].slice(0, MOST_SETTLEMENTS);
    if (parts.length > 0) {
      const settlements = parts.map((carried) => carried.part(this));
      frame.settle = { id: ++this.#lastId, settlements, confirmation: 0 };
      this.#sent.set(this.#lastId, parts);
      parts.forEach((carried) => this.#ready.delete(carried));
      if (this.#ready.size > 0) this.wake();
    }
    this.#call?.write(frame);
    if (this.#isPaused && this.#carried.size === 0) this.#call?.end();
  }

  #take(frame: ConsumeResponse): void {
    if (this.isOver) return; // A frame that comes too late is not taken.
    this.isServed = true;
    this.#heard = performance.now();
    for (const message of frame.messages) this.#keep(message, this.owner.arrived(message, this));
    for (const rejected of frame.rejected) {
      const carried = this.owner.arrivedRejected(rejected, this);
      if (carried) this.#keep(rejected, carried);
    }
    for (const result of frame.results) this.#note(result);
    for (const { number, why } of frame.ended) {
      if (why) this.#numbers.get(number)?.lose(errorOfPart(why));
    }
    if (frame.draining) {
      this.isDraining = true;
      this.owner.drains(this);
    }
    if (this.#pauseId !== undefined && frame.creditId >= this.#pauseId) {
      this.#isPaused = true;
      this.wake();
    }
  }

  #keep({ number }: { number: number }, carried: Carried): void {
    if (carried.isGone) return;
    this.#carried.add(carried);
    this.#numbers.set(number, carried);
    this.#numberOf.set(carried, number);
  }

  /** Takes the results of one frame. */
  #note({ id, results, error: failure }: ConsumeResult): void {
    const again: Carried[] = [];
    let worst: FetchProxyError | undefined;
    this.#sent.get(id)?.forEach((carried, place) => {
      const result = results[place];
      const part = failure ?? result?.error;
      if (!part) return carried.done(result?.outcome === Effect.OUTCOME_EXTENDED);
      const error = errorOfPart(part);
      if (!error.canRepeat) return carried.lose(error);
      again.push(carried);
      if (!worst || (error.retryDelay ?? 0) > (worst.retryDelay ?? 0)) worst = error;
    });
    this.#sent.delete(id);
    if (!worst) {
      this.#failed = 0;
      return;
    }
    const wait = backoff(worst, this.#failed++);
    this.owner.retry(worst, wait);
    // If the stream is over by then, the next stream has them already.
    const repeat = () => again.forEach((one) => this.#carried.has(one) && this.send(one));
    setTimeout(repeat, wait);
  }

  #end(refusal?: FetchProxyError): void {
    if (this.isOver) return;
    [this.isOver, this.refusal] = [true, refusal];
    const carried = [...this.#carried];
    this.#carried.clear();
    this.#numbers.clear();
    this.#numberOf.clear();
    this.owner.ended(this, carried);
  }
}
