// The keeper of the leases of Fetch: extends and settles them in the background, by one call at a time.

import { status } from "@grpc/grpc-js";

import type { Connection } from "./connection.js";
import { backoff, errorOf, errorOfPart, FetchProxyError } from "./errors.js";
import { SettleRequest, type SettleError, type Settlement } from "./gen/fetchproxy/v1/fetch.js";
import type { Duration } from "./gen/google/protobuf/duration.js";
import { Held, type Job } from "./held.js";
import type { Message } from "./message.js";
import { Alarm, duration, millis } from "./time.js";

/** The longest wait of an outcome for others, in milliseconds. If no handler works, it does not wait. */
const GATHERING = 10;
/** A call with more settlements is refused. */
const MOST_SETTLEMENTS = 1_000;
/** The shortest lease that the proxy accepts, in milliseconds. */
const SHORTEST = 1_000;

export interface LeasedAs {
  readonly token: string;
  readonly lease?: Duration;
}

export class Keeper {
  readonly #leases = new Set<Lease>();
  readonly #alarm = new Alarm();
  #isOver = false;

  constructor(
    private readonly connection: Connection,
    private readonly job: Job,
    /** A lease is decided, or gone, or a place is free. */
    private readonly changed: () => void,
  ) {}

  add(leased: LeasedAs, message?: Message): Lease {
    const lease = new Lease(this.job, leased, () => this.#wake(), message);
    this.#leases.add(lease);
    this.#alarm.ring();
    return lease;
  }

  *[Symbol.iterator](): Iterator<Lease> {
    for (const lease of this.#leases) if (!lease.isGone) yield lease;
  }

  /** No more leases come: `keep` ends with the last. */
  over(): void {
    this.#isOver = true;
    this.#alarm.ring();
  }

  /** Each turn makes one call, with all outcomes and extensions that are due. */
  async keep(): Promise<void> {
    for (let [quietUntil, tries] = [0, 0]; ;) {
      const now = performance.now();
      for (const lease of this.#leases) {
        lease.loseIfOver(now);
        if (lease.isGone) this.#leases.delete(lease);
      }
      if (this.#isOver && this.#leases.size === 0) return;
      const next = this.#nextTurn(quietUntil);
      if (next > now) {
        await this.#alarm.sleep(next - now);
        continue;
      }
      const due = [...this.#leases].filter((lease) => lease.due <= now).slice(0, MOST_SETTLEMENTS);
      const worst = await this.#settle(due, now);
      if (worst) {
        const wait = backoff(worst.error, tries++);
        const { reason, message: detail } = worst.error;
        this.job.emit({ name: "retry", reason, detail, wait, error: worst.error });
        const again = performance.now() + wait;
        for (const lease of due) lease.due = Math.max(lease.due, lease.isAgain ? again : 0);
        // If the whole call failed, the others fail, too.
        quietUntil = worst.isWhole ? again : 0;
      } else [quietUntil, tries] = [0, 0];
    }
  }

  #wake(): void {
    this.#alarm.ring();
    this.changed();
  }

  #nextTurn(quietUntil: number): number {
    const isWorking = this.job.places.free < this.job.places.all;
    let next = Infinity;
    for (const { outcome, due, ends } of this.#leases) {
      const turn = outcome && isWorking ? due + GATHERING : due;
      next = Math.min(next, Math.max(turn, quietUntil), ends);
    }
    return next;
  }

  /** The failure to wait for, if there is a part to repeat. */
  async #settle(
    due: Lease[],
    now: number,
  ): Promise<{ error: FetchProxyError; isWhole: boolean } | undefined> {
    const left = Math.min(...due.map(({ ends }) => ends)) - now;
    const timeout = Math.min(Math.max(left / 2, 1_000), 10_000);
    const request = SettleRequest.create({ settlements: due.map((lease) => lease.part(now)) });
    try {
      const { results } = await this.connection.settle(request, { timeout });
      due.forEach((lease, place) => lease.note(results[place] ?? {}, now));
    } catch (failure) {
      const error = errorOf(failure);
      for (const lease of due) lease.refused(error);
      return error.canRepeat ? { error, isWhole: true } : undefined;
    }
    const worst = due
      .flatMap(({ isAgain }) => isAgain ?? [])
      .sort((a, b) => (b.retryDelay ?? 0) - (a.retryDelay ?? 0))[0];
    return worst && { error: worst, isWhole: false };
  }
}

export class Lease extends Held {
  /** When to settle or extend it, on the clock of `performance`. */
  due = 0;
  ends = 0;
  /** Why its part of the last call is to be repeated. */
  isAgain?: FetchProxyError;
  #isSettling = false;

  constructor(
    job: Job,
    private readonly leased: LeasedAs,
    private readonly changed: () => void,
    message?: Message,
  ) {
    super(job, message);
    this.#lasts(performance.now(), millis(leased.lease));
  }

  /** A lease that is over by our clock counts as lost. */
  loseIfOver(now: number): void {
    if (this.ends > now) return;
    const told = now >= this.latest ? "its handler took too long" : "its time is over";
    this.lose(new FetchProxyError("LEASE_EXPIRED", status.FAILED_PRECONDITION, told));
  }

  part(now: number): Settlement {
    this.#isSettling = this.outcome !== undefined;
    const left = this.latest - now;
    // Without a length, the lease lasts as long as it was granted.
    const lease = left < millis(this.leased.lease) ? duration(Math.max(left, SHORTEST)) : undefined;
    const action = this.outcome?.action ?? { $case: "extend", value: { lease } };
    return { token: this.leased.token, action, number: 0 };
  }

  /** Records the result of its part in a call that was sent at `sent`. */
  note({ error, lease }: { error?: SettleError; lease?: Duration }, sent: number): void {
    this.isAgain = undefined;
    if (error) this.refused(errorOfPart(error));
    else if (this.#isSettling) this.settled();
    else this.#lasts(sent, millis(lease));
  }

  refused(error: FetchProxyError): void {
    this.isAgain = error.canRepeat ? error : undefined;
    if (!error.canRepeat) this.lose(error);
  }

  protected override isThere(): boolean {
    this.loseIfOver(performance.now());
    return super.isThere();
  }

  /** The next extension is due after a third of the lease, or at once if the lease is too long for its handler. */
  #lasts(from: number, length: number): void {
    const left = this.latest - from;
    this.ends = from + Math.min(length, left);
    if (this.outcome) return;
    const third = from + Math.max(length / 3, 50);
    if (length > Math.max(left, SHORTEST) + 1) this.due = from;
    else this.due = this.latest - third < SHORTEST ? Infinity : third;
  }

  protected decided(): void {
    this.due = performance.now();
    this.changed();
  }

  protected left(): void {
    this.changed();
  }

  protected freed(): void {
    this.changed();
  }
}
