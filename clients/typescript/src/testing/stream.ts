// One Consume of the fake: its credit, its deliveries, and the life of their leases.

import type { ServerDuplexStream } from "@grpc/grpc-js";

import {
  ConsumeResponse,
  type ConsumeRequest,
  type ConsumeStart,
  type SettleResult,
  type Settlement,
} from "../gen/fetchproxy/v1/fetch.js";
import { duration, millis } from "../time.js";
import { failure, type Lease, type Queue } from "./queue.js";

/** The defaults of the contract: in milliseconds, and in bytes. */
const [HEARTBEAT, GRACE, MAX_FRAME_BYTES] = [10_000, 10_000, (4 << 20) - 1_024];

/** The fake, as its streams see it. */
export interface Host {
  changed(): void;
  settle(settlement: Settlement, delivered?: Lease): SettleResult;
  left(stream: FakeStream): void;
}

export class FakeStream {
  #start?: ConsumeStart;
  #credit = 0;
  #lastNumber = 0;
  #isOver = false;
  readonly #leases = new Map<number, Lease>();
  #beats?: NodeJS.Timeout;

  constructor(
    private readonly call: ServerDuplexStream<ConsumeRequest, ConsumeResponse>,
    private readonly queue: Queue,
    private readonly host: Host,
  ) {
    call.on("data", (frame: ConsumeRequest) => this.#take(frame));
    call.on("end", () => this.#leave());
    call.on("cancelled", () => this.#leave());
    call.on("error", () => this.#leave());
  }

  /** Tells of leases that have ended by themselves. */
  lapsed(over: Lease[]): void {
    const ended = [...this.#leases].filter(([, lease]) => over.includes(lease));
    if (ended.length === 0) return;
    const why = failure("LEASE_EXPIRED", "the lease has ended").error;
    for (const [number] of ended) this.#leases.delete(number);
    this.#say({ ended: ended.map(([number]) => ({ number, why })) });
  }

  /** Sends messages, for as long as there is credit. */
  deliver(): void {
    const frame = ConsumeResponse.create();
    if (!this.#start || this.#isOver) return;
    const { codec, maxFrameBytes, holding } = this.#start;
    const most = maxFrameBytes || MAX_FRAME_BYTES;
    while (this.#leases.size < this.#credit) {
      const now = performance.now();
      const isKept = holding?.$case === "keep";
      const length = holding?.$case === "lease" ? millis(holding.value) : undefined;
      const taken = this.queue.take(now, length, codec);
      if (!taken) break;
      if ("cause" in taken) {
        frame.rejected.push(taken);
        continue;
      }
      if (isKept) {
        const { atMost } = holding.value;
        taken.latest = atMost ? now + millis(atMost) : Infinity;
        taken.ends = taken.latest;
      }
      const number = ++this.#lastNumber;
      this.#leases.set(number, taken);
      if (taken.record.payload.length > most)
        frame.rejected.push(this.queue.rejectedAsTooLarge(taken, most, number));
      else frame.messages.push(this.queue.delivery(taken, now, codec, number));
    }
    if (frame.messages.length + frame.rejected.length > 0) this.#say(frame);
  }

  #take({ start, credit, settle }: ConsumeRequest): void {
    if (start) {
      this.#start = start;
      this.#credit = start.credit?.maxLeases ?? 1;
      this.#say({ opened: undefined });
      const beat = start.heartbeat ? millis(start.heartbeat) : HEARTBEAT;
      this.#beats = setInterval(() => this.#say({}), beat);
    }
    if (credit) {
      this.#credit = credit.maxLeases ?? this.#credit;
      this.#say({ creditId: credit.id });
    }
    if (settle) {
      const results = settle.settlements.map((part) => this.#settle(part));
      const failed = results.filter(({ error }) => error).length;
      this.#say({ results: [{ id: settle.id, results, failed, error: undefined }] });
    }
    this.host.changed();
  }

  #settle(part: Settlement): SettleResult {
    const lease = this.#leases.get(part.number);
    if (part.number && !lease) return failure("LEASE_EXPIRED", "the lease has ended");
    const result = this.host.settle(part, lease);
    if (lease?.end) this.#leases.delete(part.number);
    return result;
  }

  #say(frame: Partial<ConsumeResponse>): void {
    if (!this.#isOver) this.call.write(ConsumeResponse.create(frame));
  }

  /** The leases outlive the stream by `grace`. */
  #leave(): void {
    if (this.#isOver) return;
    this.#isOver = true;
    clearInterval(this.#beats);
    const { holding } = this.#start ?? {};
    const grace = holding?.$case === "keep" ? (holding.value.grace ?? duration(GRACE)) : undefined;
    for (const lease of this.#leases.values())
      if (grace) lease.ends = Math.min(performance.now() + millis(grace), lease.latest);
    this.call.end();
    this.host.left(this);
  }
}
