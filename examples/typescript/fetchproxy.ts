// What every worker needs around the generated client: which errors are worth repeating a call and
// after how long, a heartbeat that keeps leases, and settling with the same token until it is done.

import { setTimeout as sleep } from "node:timers/promises";

import {
  credentials,
  Metadata,
  status,
  type CallOptions,
  type ClientUnaryCall,
  type ServiceError,
} from "@grpc/grpc-js";

import {
  FetchServiceClient,
  RejectedCause,
  SettleRequest,
  type Delivery,
  type FetchRequest,
  type FetchResponse,
  type Rejected,
  type SettleError,
  type Settlement,
  type SettleResult,
} from "./gen/fetchproxy/v1/fetch.js";
import type { Duration } from "./gen/google/protobuf/duration.js";

/** The largest answer that is asked for, and taken. */
export const MAX_BYTES = 16 << 20;

// All times are in milliseconds.
/** The first wait before a call is repeated, if the proxy names none, and the longest. */
const [FIRST_WAIT, LONGEST_WAIT] = [100, 5_000];
/** What a Fetch has beyond its maxWait, and a settlement at all: the proxy answers well before. */
const PATIENCE = 10_000;
/** An empty answer that came sooner is followed by a pause. */
const [TOO_SOON, PAUSE] = [1_000, 500];
/** The proxy grants no shorter lease to those who ask. */
const SHORTEST_LEASE = 1_000;
/** Nor does it take a longer delay; one settlement that it does not take spoils the whole call. */
const LONGEST_DELAY = 24 * 3_600_000;

/** What handle throws for a failure that may pass: the message comes back after so many seconds. */
export class Transient extends Error {
  constructor(readonly delay: number) {
    super(`not now, again in ${delay} s`);
  }
}

/** What handle throws for a failure that never passes: the message does not come back. */
export class Poison extends Error {}

/** How a message ended for this worker. */
export type Outcome =
  | "acked"
  | "nacked"
  | "termed"
  /** Not begun, and given back. */
  | "returned"
  /** The lease was over: another worker has the message, or will. */
  | "lost";

type Action = NonNullable<Settlement["action"]>;

/** A connection to fetch-proxy. */
export class FetchProxy {
  readonly #client: FetchServiceClient;

  /**
   * @param address any target that gRPC knows, as `dns:///fetch-proxy:50051`; or IP addresses with
   *   commas between, which are tried in turn
   * @param onRetry called before each wait after an error
   */
  constructor(
    address: string,
    private readonly onRetry: (reason: string, wait: number) => void,
  ) {
    const target = address.includes(",") ? `ipv4:${address}` : address;
    this.#client = new FetchServiceClient(target, credentials.createInsecure(), {
      "grpc.max_receive_message_length": MAX_BYTES,
      "grpc.keepalive_time_ms": 30_000,
      "grpc.initial_reconnect_backoff_ms": FIRST_WAIT,
      "grpc.max_reconnect_backoff_ms": LONGEST_WAIT,
    });
  }

  close(): void {
    this.#client.close();
  }

  /** Answers until `stop`. Throws when a Fetch is refused for good. */
  async *fetch(request: FetchRequest, stop: AbortSignal): AsyncGenerator<FetchResponse> {
    while (!stop.aborted) {
      const began = performance.now();
      const answer = await this.#answer(request, stop);
      if (!answer) return;
      yield answer;
      const nothing = answer.messages.length + answer.rejected.length === 0;
      if (nothing && performance.now() - began < TOO_SOON) await pause(PAUSE, stop);
    }
  }

  /** Repeats the call until it is answered; or, in vain, until `stop`. */
  async #answer(request: FetchRequest, stop: AbortSignal): Promise<FetchResponse | undefined> {
    const timeout = millis(request.maxWait) + PATIENCE;
    for (let attempt = 0; ; attempt++) {
      try {
        return await unary(this.#client.fetch.bind(this.#client), request, timeout, stop);
      } catch (error) {
        if (stop.aborted) return undefined;
        const trouble = troubleOf(error as ServiceError);
        if (!trouble.passes) throw error;
        await this.wait(trouble, attempt, stop);
      }
    }
  }

  /** Starts the heartbeat of a batch. */
  hold(messages: Delivery[]): Batch {
    return new Batch(this, messages);
  }

  /**
   * Settles a rejected message that is still leased to us. Should that fail, the lease ends by
   * itself, and the message is rejected again.
   */
  async refuse({ token, cause, detail, streamSequence }: Rejected): Promise<void> {
    if (!token) return;
    // Perhaps there is a worker with a larger MAX_BYTES.
    const tooLarge = cause === RejectedCause.REJECTED_CAUSE_TOO_LARGE;
    const action = tooLarge ? nak(60_000) : term(detail);
    await this.settle([{ token, action }], PATIENCE).catch((error: ServiceError) =>
      console.error(`message ${streamSequence}: ${error.message}`),
    );
  }

  /** @internal */
  async settle(settlements: Settlement[], timeout: number): Promise<SettleResult[]> {
    const request = SettleRequest.create({ settlements });
    return (await unary(this.#client.settle.bind(this.#client), request, timeout)).results;
  }

  /**
   * Passes the time that the error asks for, or else more each time. There is some chance in it,
   * for workers that failed together must not come back together.
   *
   * @internal
   */
  async wait(trouble: Trouble, attempt: number, stop?: AbortSignal): Promise<void> {
    const least = trouble.delay ?? (FIRST_WAIT * 2 ** Math.min(attempt, 6)) / 2;
    const wait = Math.min(least * (1 + Math.random()), LONGEST_WAIT);
    this.onRetry(trouble.reason, wait / 1_000);
    await pause(wait, stop);
  }
}

/** A message in hand, and the right to settle it until the lease ends. */
export class Lease {
  /** What was decided, and is not settled yet. */
  settlement?: Settlement;
  outcome?: Outcome;
  /** Whether the heartbeat keeps it: until it is being settled. */
  kept = true;

  #ends: number;
  readonly #over = new AbortController();

  constructor(
    readonly message: Delivery,
    private readonly onDecision: () => void,
  ) {
    this.#ends = performance.now() + millis(message.lease);
  }

  /** Aborts when the lease is lost, so that work that would be done twice can end. */
  get signal(): AbortSignal {
    return this.#over.signal;
  }

  get left(): number {
    return this.#ends - performance.now();
  }

  get lost(): boolean {
    if (this.outcome !== "lost" && this.left <= 0) this.lose("by our clock, its lease is over");
    return this.outcome === "lost";
  }

  /** Decides that the message is done. Batch.settle carries it out, as with all decisions. */
  ack(): void {
    this.#decide("acked", { $case: "ack", value: {} });
  }

  /** Decides that the message is to come back after the delay, in seconds. */
  nak(delay: number): void {
    this.#decide("nacked", nak(delay * 1_000));
  }

  /** Decides that the message is not to come back. */
  term(reason: string): void {
    this.#decide("termed", term(reason));
  }

  /** Decides that the message is for another worker, at once. */
  giveBack(): void {
    this.#decide("returned", nak(0));
  }

  #decide(outcome: Outcome, action: Action): void {
    if (this.lost) return;
    this.outcome = outcome;
    this.settlement = { token: this.message.token, action };
    this.onDecision();
  }

  extended(lease: Duration | undefined): void {
    this.#ends = performance.now() + millis(lease);
  }

  lose(why: string): void {
    console.error(`message ${this.message.streamSequence} is lost: ${why}`);
    this.outcome = "lost";
    this.settlement = undefined;
    this.#over.abort();
  }
}

/** What one Fetch brought. A heartbeat keeps its leases until they are settled. */
export class Batch {
  readonly leases: Lease[];
  readonly #released = new AbortController();
  /** Since when an outcome waits to be settled. */
  #waiting?: number;

  constructor(
    private readonly proxy: FetchProxy,
    messages: Delivery[],
  ) {
    const onDecision = () => void (this.#waiting ??= performance.now());
    this.leases = messages.map((message) => new Lease(message, onDecision));
    void this.#beat();
  }

  /** Ends the heartbeat. Leases that are not settled end by themselves. */
  release(): void {
    this.#released.abort();
  }

  /** For how long the oldest decision has been waiting for `settle`. */
  get waited(): number {
    return this.#waiting === undefined ? 0 : performance.now() - this.#waiting;
  }

  /**
   * Carries out what was decided, and returns it together with what was lost. Goes on until each is
   * done, refused for good, or over: every settlement may be repeated with the same token.
   */
  async settle(): Promise<Lease[]> {
    this.#waiting = undefined;
    const taken = this.leases.filter((lease) => lease.kept && (lease.outcome || lease.lost));
    for (const lease of taken) lease.kept = false;
    for (let attempt = 0; ; attempt++) {
      const open = taken.filter((lease) => lease.settlement && !lease.lost);
      if (open.length === 0) return taken;
      const trouble = await this.#settleOnce(open);
      if (trouble) await this.proxy.wait(trouble, attempt);
    }
  }

  /** Returns the trouble of those that are to be repeated, if there are any. */
  async #settleOnce(open: Lease[]): Promise<Trouble | undefined> {
    let results: SettleResult[];
    try {
      results = await this.proxy.settle(
        open.map((lease) => lease.settlement!),
        PATIENCE,
      );
    } catch (error) {
      const trouble = troubleOf(error as ServiceError);
      if (trouble.passes) return trouble;
      open.forEach((lease) => lease.lose((error as ServiceError).message));
      return undefined;
    }
    let again: Trouble | undefined;
    for (const [i, lease] of open.entries()) {
      const refused = results[i]!.error;
      if (!refused) lease.settlement = undefined;
      else if (troubleIn(refused).passes) again = troubleIn(refused);
      else lease.lose(refused.message);
    }
    return again;
  }

  /** Extends the leases whenever a third of what is left of the shortest has passed. */
  async #beat(): Promise<void> {
    for (;;) {
      const third = Math.max(this.#shortest() / 3, 20);
      if (!Number.isFinite(third)) return;
      await pause(third, this.#released.signal);
      if (this.#released.signal.aborted) return;
      await this.#extend().catch((error) => console.error(`no heartbeat: ${error.message}`));
    }
  }

  #kept(): Lease[] {
    return this.leases.filter((lease) => lease.kept && !lease.lost);
  }

  #shortest(): number {
    return Math.min(...this.#kept().map((lease) => lease.left));
  }

  /** Is not repeated when it fails: the next beat comes soon enough. */
  async #extend(): Promise<void> {
    const kept = this.#kept();
    if (kept.length === 0) return;
    const extensions = kept.map(({ message }): Settlement => {
      const lease = duration(Math.max(millis(message.lease), SHORTEST_LEASE));
      return { token: message.token, action: { $case: "extend", value: { lease } } };
    });
    const results = await this.proxy.settle(extensions, Math.max(this.#shortest() / 2, 100));
    for (const [i, lease] of kept.entries()) {
      const { error, lease: left } = results[i]!;
      // What is being settled meanwhile may be refused for that.
      if (!lease.kept) continue;
      if (!error) lease.extended(left);
      else if (!troubleIn(error).passes) lease.lose(error.message);
    }
  }
}

/** What an error means for its call. */
interface Trouble {
  reason: string;
  /** Whether to repeat the call. */
  passes: boolean;
  /** After how long, if the proxy said so. */
  delay?: number;
}

/** The same call would be refused again. */
const REFUSALS = [
  status.INVALID_ARGUMENT,
  status.NOT_FOUND,
  status.FAILED_PRECONDITION,
  status.PERMISSION_DENIED,
  status.UNAUTHENTICATED,
  status.UNIMPLEMENTED,
];

/**
 * The trailers say the same as the ErrorInfo and RetryInfo that they come with. An error without
 * them was made on the way: its code alone tells, as with reasons that are not known yet.
 */
function troubleOf({ code, metadata }: ServiceError): Trouble {
  const pushback = trailer(metadata, "grpc-retry-pushback-ms");
  return {
    reason: trailer(metadata, "fetchproxy-reason") ?? status[code]!,
    passes: !REFUSALS.includes(code),
    delay: pushback === undefined ? undefined : Number(pushback),
  };
}

function trailer(metadata: Metadata, name: string): string | undefined {
  return metadata.get(name)[0]?.toString();
}

function troubleIn({ reason, retryDelay }: SettleError): Trouble {
  const passes = retryDelay !== undefined || reason === "SETTLE_UNCONFIRMED";
  return { reason, passes, delay: retryDelay && millis(retryDelay) };
}

function nak(delay: number): Action {
  const taken = Math.min(Math.max(delay, 0), LONGEST_DELAY);
  return { $case: "nak", value: { delay: duration(taken) } };
}

function term(reason: string): Action {
  return { $case: "term", value: { reason } };
}

export function duration(millis: number): Duration {
  const seconds = Math.floor(millis / 1_000);
  return { seconds, nanos: Math.floor((millis % 1_000) * 1e6) };
}

function millis(duration: Duration | undefined): number {
  return duration ? duration.seconds * 1_000 + duration.nanos / 1e6 : 0;
}

async function pause(wait: number, stop?: AbortSignal): Promise<void> {
  await sleep(wait, undefined, { signal: stop }).catch(() => undefined);
}

/** A call as a promise. */
function unary<Request, Response>(
  method: (
    request: Request,
    metadata: Metadata,
    options: CallOptions,
    callback: (error: ServiceError | null, response: Response) => void,
  ) => ClientUnaryCall,
  request: Request,
  timeout: number,
  stop?: AbortSignal,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + timeout };
    const call = method(request, new Metadata(), options, (error, response) => {
      stop?.removeEventListener("abort", cancel);
      if (error) reject(error);
      else resolve(response);
    });
    const cancel = () => call.cancel();
    stop?.addEventListener("abort", cancel);
  });
}
