// The messages of the fake: who has them, and what has become of them. Has no clock and no network.

import { FetchProxyError } from "../errors.js";
import {
  Codec,
  Delivery,
  Outcome,
  Rejected,
  RejectedCause,
  SettleError,
  SettleResult,
  type Settlement,
} from "../gen/fetchproxy/v1/fetch.js";
import { REASONS } from "../reasons.js";
import { duration, millis } from "../time.js";

/** A settlement that the fake has carried out. */
export interface Settled {
  readonly action: "ack" | "nak" | "term";
  /** The number of the attempt, from 1. */
  readonly attempt: number;
  /** The delay of a Nak, in milliseconds. */
  readonly delay?: number;
  /** The reason of a Term. */
  readonly reason?: string;
}

/** A message of the fake. */
export interface FakeRecord {
  /** The number of the message in its stream, from 1. */
  readonly sequence: number;
  readonly payload: Buffer;
  readonly subject: string;
  readonly headers: ReadonlyMap<string, readonly string[]>;
  readonly timestamp: Date;
  /** How often it was delivered. */
  attempts: number;
  readonly settlements: Settled[];
  /** It is not delivered again. */
  ended: boolean;
}

/** A delivery. It is leased until `ends`. */
export interface Lease {
  readonly record: FakeRecord;
  readonly token: string;
  readonly attempt: number;
  /** How long it was granted, in milliseconds. */
  readonly length: number;
  ends: number;
  /** The end at the latest, whatever extends it. */
  latest: number;
  /** How it was settled, or that it has expired. */
  end?: Settled["action"] | "expired";
}

/** One stream with one consumer. Times are milliseconds of any clock. */
export class Queue {
  readonly records: FakeRecord[] = [];
  readonly #ready: FakeRecord[] = [];
  readonly #leases = new Map<string, Lease>();
  readonly #open = new Set<Lease>();

  constructor(
    readonly maxDeliver: number,
    readonly ackWait: number,
  ) {}

  get hasReady(): boolean {
    return this.#ready.length > 0;
  }

  /** Every message has ended. */
  get isIdle(): boolean {
    return this.records.every(({ ended }) => ended);
  }

  publish(payload: Buffer, subject: string, headers: Map<string, string[]>): FakeRecord {
    const sequence = this.records.length + 1;
    const fresh = { attempts: 0, settlements: [], ended: false, timestamp: new Date() };
    const record: FakeRecord = { sequence, payload, subject, headers, ...fresh };
    this.records.push(record);
    this.#ready.push(record);
    return record;
  }

  /** The next message, leased for `length`. A payload that is not of the codec is terminated. */
  take(now: number, length: number | undefined, codec: Codec): Lease | Rejected | undefined {
    const record = this.#ready.shift();
    if (!record) return undefined;
    const attempt = ++record.attempts;
    const detail = faultOf(record, codec);
    if (detail) {
      record.settlements.push({ action: "term", attempt, reason: detail });
      record.ended = true;
      const cause = RejectedCause.REJECTED_CAUSE_CODEC;
      return rejectedOf(record, { cause, detail, data: record.payload });
    }
    const granted = length ?? this.ackWait;
    const token = `fake-${record.sequence}-${attempt}-${this.#leases.size}`;
    const ends = now + granted;
    const lease: Lease = { record, token, attempt, length: granted, ends, latest: Infinity };
    this.#leases.set(token, lease);
    this.#open.add(lease);
    return lease;
  }

  /** A delivery that does not fit into an answer: it is leased. */
  rejectedAsTooLarge({ record, token, length }: Lease, mostBytes: number, number = 0): Rejected {
    const cause = RejectedCause.REJECTED_CAUSE_TOO_LARGE;
    const detail = `the message is larger than ${mostBytes} bytes`;
    return rejectedOf(record, { cause, detail, token, lease: duration(length), number });
  }

  /** The delivery as the contract has it. */
  delivery(lease: Lease, now: number, codec: Codec, number = 0): Delivery {
    const { record, token, attempt: deliveryCount } = lease;
    const { subject, sequence: streamSequence, payload, timestamp: publishTime } = record;
    const isText = codec === Codec.CODEC_JSON || codec === Codec.CODEC_TEXT;
    return Delivery.create({
      ...{ token, subject, streamSequence, deliveryCount, publishTime, number },
      consumerSequence: streamSequence,
      maxDeliver: this.maxDeliver,
      headers: headersOf(record),
      lease: duration(Math.min(Math.max(lease.ends - now, 0), 3_600_000)),
      payload: isText
        ? { $case: "text", value: payload.toString() }
        : { $case: "data", value: payload },
    });
  }

  leaseOf(token: string): Lease | undefined {
    return this.#leases.get(token);
  }

  /** Carries out the settlement of a lease. */
  settle(lease: Lease | undefined, action: Settlement["action"], now: number): SettleResult {
    if (!lease || !action) return failure("TOKEN_INVALID", "this is not a token of this fake");
    if (lease.end === "expired") return failure("LEASE_EXPIRED", "the lease has ended");
    if (lease.end === action.$case)
      return SettleResult.create({ outcome: Outcome.OUTCOME_DUPLICATE });
    if (lease.end) return failure("LEASE_SETTLED", `the message was settled by ${lease.end}`);
    if (action.$case === "extend") {
      const { lease: asked } = action.value;
      lease.ends = Math.min(now + (asked ? millis(asked) : lease.length), lease.latest);
      const left = duration(lease.ends - now);
      return SettleResult.create({ outcome: Outcome.OUTCOME_EXTENDED, lease: left });
    }
    this.#end(lease, action);
    return SettleResult.create({ outcome: Outcome.OUTCOME_CONFIRMED });
  }

  /** The leases that are over: their messages are delivered again. */
  lapse(now: number): Lease[] {
    const over = [...this.#open].filter(({ ends }) => ends <= now);
    for (const lease of over) {
      this.#close(lease, "expired");
      this.#again(lease.record);
    }
    return over;
  }

  /** When the next lease ends. */
  nextLapse(): number {
    return Math.min(...[...this.#open].map(({ ends }) => ends));
  }

  /** Ends the lease of a message, if there is a lease. */
  expire(record: FakeRecord): void {
    for (const lease of this.#open) if (lease.record === record) lease.ends = -Infinity;
  }

  /** Takes back a delivery that nobody has seen. It costs no attempt. */
  release(lease: Lease): void {
    if (lease.end) return;
    this.#close(lease, "expired");
    lease.record.attempts--;
    this.#ready.unshift(lease.record);
  }

  #close(lease: Lease, end: Lease["end"]): void {
    lease.end = end;
    this.#open.delete(lease);
  }

  #end(lease: Lease, action: Exclude<Settlement["action"], undefined | { $case: "extend" }>): void {
    const { record, attempt } = lease;
    this.#close(lease, action.$case);
    if (action.$case === "nak") {
      record.settlements.push({ action: "nak", attempt, delay: millis(action.value.delay) });
      return this.#again(record);
    }
    const reason = action.$case === "term" ? { reason: action.value.reason } : {};
    record.settlements.push({ action: action.$case, attempt, ...reason });
    record.ended = true;
  }

  #again(record: FakeRecord): void {
    if (this.maxDeliver > 0 && record.attempts >= this.maxDeliver) record.ended = true;
    else this.#ready.push(record);
  }
}

/** Why the payload is not of the codec. Undefined: it is. */
function faultOf({ payload, headers }: FakeRecord, codec: Codec): string | undefined {
  if (codec !== Codec.CODEC_JSON && codec !== Codec.CODEC_TEXT) return undefined;
  const isTombstone = ["Nats-Msg-Size", "Nats-Marker-Reason", "KV-Operation"];
  if (payload.length === 0 && isTombstone.some((name) => headers.has(name))) return undefined;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(payload);
    if (codec === Codec.CODEC_JSON) JSON.parse(text);
    return undefined;
  } catch (error) {
    return `not ${codec === Codec.CODEC_JSON ? "JSON" : "UTF-8"}: ${(error as Error).message}`;
  }
}

function rejectedOf(record: FakeRecord, more: Partial<Rejected>): Rejected {
  const { subject, sequence: streamSequence, attempts: deliveryCount, payload } = record;
  const size = payload.length;
  return Rejected.create({ subject, streamSequence, deliveryCount, size, ...more });
}

function headersOf({ headers }: FakeRecord): Delivery["headers"] {
  return new Map([...headers].map(([name, values]) => [name, { values: [...values] }]));
}

/** The refusal of a part, with the wait of a proxy that is in a hurry. */
export function failure(reason: string, message: string): SettleResult {
  const code = REASONS.get(reason)!;
  const { canRepeat } = new FetchProxyError(reason, code, message);
  const retryDelay = canRepeat ? duration(HURRY) : undefined;
  return SettleResult.create({ error: SettleError.create({ reason, message, retryDelay }) });
}

/** How long the fake asks to wait before a repeat, in milliseconds. */
export const HURRY = 10;
