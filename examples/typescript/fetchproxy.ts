// The part of a worker around the generated client: the channel, repeats, and a batch whose keeper
// extends the leases and settles the messages. Copy it without changes. It must know nothing of the
// work.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { setImmediate as breathe, setTimeout as sleep } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";

import {
  credentials,
  Metadata,
  status,
  type CallOptions,
  type ClientDuplexStream,
  type ClientUnaryCall,
  type ServiceError,
} from "@grpc/grpc-js";

import {
  Delivery,
  FetchServiceClient,
  RejectedCause,
  SettleRequest,
  SettleResponse,
  type ConsumeRequest,
  type ConsumeResponse,
  type FetchRequest,
  type FetchResponse,
  type GiveBackRequest,
  type Rejected,
  type SettleError,
  type Settlement,
} from "./gen/fetchproxy/v1/fetch.js";
import type { Duration } from "./gen/google/protobuf/duration.js";

/** The largest answer, in bytes. The library's own limit is 4 MiB: raise both together. */
export const MAX_BYTES = 16 << 20;

// All times are in milliseconds.
/** The longest wait before a call is repeated. A Fetch has this time in addition to its own wait. */
const PATIENCE = 5_000;
/** The longest wait of an outcome for others. If no other is left, the outcome does not wait. */
const GATHERING = 100;

/** Thrown by work that may succeed later: the message comes back after so many seconds. */
export class Transient extends Error {
  constructor(readonly delay: number) {
    super(`not now, again in ${delay} s`);
  }
}

/** Thrown by work that will never succeed: the message does not come back. */
export class Poison extends Error {}

/**
 * The work on a message. Its result goes to the log line when the message is acked. After an error
 * that is neither of the above, the message comes back in 5 s. The signal aborts when another worker
 * may have received the message.
 */
export type Handler = (message: Delivery, signal: AbortSignal) => Promise<object | void>;

/**
 * The proxy at `host:port`, at `https://host:port` with TLS, or at `dns:///name:port` with an address
 * for each replica. The files of credentials are read for each call: the next call has the new token,
 * and a new certificate makes a new client.
 */
export class FetchProxy {
  #client?: FetchServiceClient;
  #files: (Buffer | undefined)[] = [];

  constructor(private readonly address: string) {
    const isProtected = /^(https:|(dns:\/\/\/)?(localhost|127\.0\.0\.1|\[::1\]):)/.test(address);
    if (content("BEARER_FILE") && !isProtected)
      throw new Error(`a credential is not sent to ${address} without TLS: use https://`);
  }

  async fetch(request: FetchRequest, timeout: number, stop: AbortSignal): Promise<FetchResponse> {
    const client = this.#connected();
    return call(client.fetch.bind(client), request, timeout, stop);
  }

  async settle(request: SettleRequest, timeout: number): Promise<SettleResponse> {
    const client = this.#connected();
    return call(client.settle.bind(client), request, timeout);
  }

  async giveBack(request: GiveBackRequest): Promise<object> {
    const client = this.#connected();
    return call(client.giveBack.bind(client), request, 1_000);
  }

  consume(): ClientDuplexStream<ConsumeRequest, ConsumeResponse> {
    return this.#connected().consume(credential());
  }

  /** Open calls may end. */
  close(): void {
    this.#client?.close();
  }

  #connected(): FetchServiceClient {
    const files = [content("CA"), content("KEY"), content("CERT")];
    if (this.#client && isDeepStrictEqual(files, this.#files)) return this.#client;
    this.close();
    this.#files = files;
    const [ca, key, cert] = files;
    const target = this.address.replace("https://", "");
    const plain = target === this.address;
    const channel = plain ? credentials.createInsecure() : credentials.createSsl(ca, key, cert);
    return (this.#client = new FetchServiceClient(target, channel, {
      "grpc.max_receive_message_length": MAX_BYTES + (1 << 20),
      "grpc.keepalive_time_ms": 30_000,
      "grpc.keepalive_permit_without_calls": 1,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": PATIENCE,
      "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
      "grpc.service_config_disable_resolution": 1,
    }));
  }
}

/** The content of the file that this variable names, if it is set. */
function content(name: string): Buffer | undefined {
  const path = process.env[`FETCH_PROXY_${name}`];
  return path ? readFileSync(path) : undefined;
}

/**
 * The next answer with messages. Undefined if the worker must stop first. The repeats of a call have
 * one name, so they get the messages of an answer that was lost.
 */
export async function fetchSome(
  proxy: FetchProxy,
  request: FetchRequest,
  stop: AbortSignal,
): Promise<FetchResponse | undefined> {
  const timeout = millis(request.maxWait) + PATIENCE;
  let attempt = { attemptId: randomUUID(), attemptAgain: false };
  for (let tries = 0; !stop.aborted;) {
    const began = performance.now();
    let wait: number;
    try {
      const answer = await proxy.fetch({ ...request, ...attempt }, timeout, stop);
      if (answer.messages.length + answer.rejected.length > 0) return answer;
      // A draining proxy, for example, answers at once.
      wait = began + 500 - performance.now();
      tries = 0;
      attempt = { attemptId: randomUUID(), attemptAgain: false };
    } catch (error) {
      if (stop.aborted) break;
      const refusal = refusalIn(error as ServiceError);
      if (!passes(refusal)) throw new Error(`${refusal.reason}: ${refusal.message}`);
      wait = backoff(refusal, tries++);
      attempt.attemptAgain = true;
    }
    await pause(wait, stop);
  }
  // If this fails, messages of an answer that nobody reads come back when their leases end.
  const { stream, consumer } = request;
  const { attemptId } = attempt;
  await proxy.giveBack({ stream, consumer, attemptId }).catch((error) => {
    console.error("the last Fetch is not given back:", error.message);
  });
  return undefined;
}

/** The messages of one Fetch, with a keeper that extends and settles the leases until all are gone. */
export class Batch {
  readonly leases: Lease[];
  readonly gone: Promise<void>;
  #bell = new AbortController();

  /** Logs the rejected messages. On `stop`, gives back all messages that are not begun. */
  constructor(
    private readonly proxy: FetchProxy,
    { messages, rejected }: FetchResponse,
    private readonly stop: AbortSignal,
  ) {
    this.leases = messages.map((message) => new Lease(message));
    rejected.forEach(tellOf);
    const leased = rejected.filter(({ token }) => token).map(rejectedLease);
    this.gone = this.#keep([...this.leases, ...leased]);
  }

  /** Works on a message if it is still ours. The result of the work decides the outcome. */
  async work(lease: Lease, handle: Handler): Promise<void> {
    // Lets the keeper run, even if the work never waits.
    await breathe();
    lease.stays ||= !this.stop.aborted;
    if (!lease.isThere(performance.now()) || !lease.stays) return;
    const outcome = await outcomeOf(handle, lease.message, lease.gone.signal);
    if (lease.gone.signal.aborted) return;
    lease.decide(outcome);
    this.#bell.abort();
  }

  /** The keeper. Each turn makes one call, with all outcomes and extensions that are due. */
  async #keep(leases: Lease[]): Promise<void> {
    const onStop = () => this.#bell.abort();
    this.stop.addEventListener("abort", onStop);
    let [quietUntil, tries] = [0, 0];
    for (;;) {
      const now = performance.now();
      leases = leases.filter((lease) => lease.isThere(now));
      if (leases.length === 0) break;
      if (this.stop.aborted) leases.forEach((lease) => lease.giveBack());
      const open = leases.some(({ outcome }) => !outcome);
      const turns = leases.map(({ outcome, due, ends }) => {
        const turn = outcome && open ? due + GATHERING : due;
        return Math.min(Math.max(turn, quietUntil), ends);
      });
      const wait = Math.min(...turns) - now;
      if (wait > 0) {
        this.#bell = new AbortController();
        await pause(wait, this.#bell.signal);
        continue;
      }
      // The proxy accepts no more in a call.
      const due = leases.filter((lease) => lease.due <= now).slice(0, 1_000);
      const { results, failed } = await this.#settle(due, now);
      const again = results.flatMap(({ error }) => (error && passes(error) ? [error] : []));
      const worst = again.sort((a, b) => millis(b.retryDelay) - millis(a.retryDelay))[0];
      if (!worst) tries = 0;
      const next = worst ? performance.now() + backoff(worst, tries++) : now;
      due.forEach((lease, i) => lease.note(results[i]!, now, next));
      quietUntil = failed ? next : now;
    }
    this.stop.removeEventListener("abort", onStop);
  }

  async #settle(due: Lease[], now: number): Promise<{ results: Result[]; failed: boolean }> {
    const left = Math.min(...due.map(({ ends }) => ends)) - now;
    const timeout = Math.min(Math.max(left / 2, 1_000), 10_000);
    const request = SettleRequest.create({ settlements: due.map((lease) => lease.part()) });
    try {
      const { results } = await this.proxy.settle(request, timeout);
      return { results, failed: false };
    } catch (error) {
      const refusal = refusalIn(error as ServiceError);
      return { results: due.map(() => ({ error: refusal, lease: undefined })), failed: true };
    }
  }
}

export type Action = NonNullable<Settlement["action"]>;
/** How a message is settled, and what its log line says. */
export type Outcome = { event: string; action: Action; told?: object | void };
export type Refusal = Pick<SettleError, "reason" | "message" | "retryDelay">;
type Result = { error: Refusal | undefined; lease: Duration | undefined };

/** A message in hand, until it is settled or its lease is lost. */
class Lease {
  ends = 0;
  /** When to settle or extend it. */
  due = 0;
  /** Begun, or on its last attempt. A Nak of the last attempt would end the message. */
  stays: boolean;
  /** Aborts when the lease is gone. */
  readonly gone = new AbortController();
  outcome?: Action;
  /** Whether the call under way settles the message. Otherwise the call extends the lease. */
  #settling = false;
  #line: object;

  constructor(
    readonly message: Delivery,
    /** A rejected message was logged already. */
    readonly rejected = false,
  ) {
    this.stays = message.maxDeliver > 0 && message.deliveryCount >= message.maxDeliver;
    this.#line = about(message);
    this.#lasts(performance.now(), message.lease);
  }

  /** A lease that is over by our clock counts as lost. */
  isThere(now: number): boolean {
    if (!this.gone.signal.aborted && this.ends <= now) this.#lose("its time is over");
    return !this.gone.signal.aborted;
  }

  decide({ event, action, told }: Outcome): void {
    this.#line = { event, ...this.#line, ...told };
    this.outcome = action;
    this.due = performance.now();
  }

  giveBack(): void {
    if (!this.stays && !this.outcome) this.decide({ event: "returned", action: nak(0) });
  }

  part(): Settlement {
    this.#settling = this.outcome !== undefined;
    // Without a length, the lease lasts as long as it was granted.
    const extend: Action = { $case: "extend", value: { lease: undefined } };
    return { token: this.message.token, action: this.outcome ?? extend, number: 0 };
  }

  /** Records the result of its part in a call that was sent at `sent`, and when to repeat it. */
  note({ error, lease }: Result, sent: number, next: number): void {
    if (this.gone.signal.aborted) return;
    if (error && passes(error)) this.due = next;
    else if (error) this.#lose(`${error.reason}: ${error.message}`);
    else if (this.#settling) this.#end();
    else this.#lasts(sent, lease);
  }

  /** The next extension is due after a third of the lease. */
  #lasts(from: number, length: Duration | undefined): void {
    this.ends = from + millis(length);
    if (!this.outcome) this.due = from + Math.max(millis(length) / 3, 50);
  }

  #lose(why: string): void {
    console.error(`message ${this.message.streamSequence} is lost: ${why}`);
    this.#line = { ...this.#line, event: "lost" };
    this.#end();
  }

  #end(): void {
    if (!this.rejected) say(this.#line);
    this.gone.abort();
  }
}

/** The outcome of the work. */
export async function outcomeOf(
  handle: Handler,
  message: Delivery,
  signal: AbortSignal,
): Promise<Outcome> {
  try {
    const told = await handle(message, signal);
    return { event: "acked", action: { $case: "ack", value: {} }, told };
  } catch (error) {
    if (error instanceof Transient) return { event: "nacked", action: nak(error.delay * 1_000) };
    if (error instanceof Poison) return { event: "termed", action: term(error.message) };
    if (!signal.aborted) console.error(`message ${message.streamSequence}:`, error);
    return { event: "nacked", action: nak(5_000) };
  }
}

/** A rejected message with a token is also leased. */
function rejectedLease(rejected: Rejected): Lease {
  const { token, streamSequence, lease: left } = rejected;
  const lease = new Lease(Delivery.create({ token, streamSequence, lease: left }), true);
  lease.decide(outcomeOfRejected(rejected));
  return lease;
}

export function tellOf({ streamSequence: sequence, deliveryCount, detail }: Rejected): void {
  console.error(`message ${sequence} is rejected: ${detail}`);
  say({ event: "rejected", sequence, deliveries: deliveryCount, id: null });
}

export function outcomeOfRejected({ cause, detail }: Rejected): Outcome {
  const tooLarge = cause === RejectedCause.REJECTED_CAUSE_TOO_LARGE;
  // Another worker may accept larger answers.
  return { event: "rejected", action: tooLarge ? nak(60_000) : term(detail) };
}

function nak(delay: number): Action {
  // The proxy accepts no longer delay.
  const taken = Math.min(Math.max(delay || 0, 0), 24 * 3_600_000);
  return { $case: "nak", value: { delay: duration(taken) } };
}

function term(reason: string): Action {
  const bytes = new TextEncoder().encodeInto(reason, new Uint8Array(1024));
  return { $case: "term", value: { reason: reason.slice(0, bytes.read) } };
}

/** With these codes the same call would be refused again. */
const HOPELESS = [
  status.INVALID_ARGUMENT,
  status.NOT_FOUND,
  status.FAILED_PRECONDITION,
  status.PERMISSION_DENIED,
  status.UNAUTHENTICATED,
  status.UNIMPLEMENTED,
];

/** Why a call failed, as the error of each part. The trailers repeat ErrorInfo and RetryInfo. */
export function refusalIn({ code, message, details, metadata }: ServiceError): Refusal {
  // A file that cannot be read is an error without metadata.
  const trailer = (name: string) => metadata?.get(name)[0]?.toString();
  const wait = duration(Number(trailer("grpc-retry-pushback-ms") ?? 0));
  return {
    reason: trailer("fetchproxy-reason") ?? status[code] ?? code,
    message: details ?? message,
    retryDelay: HOPELESS.includes(code) ? undefined : wait,
  };
}

/** Whether the call may be repeated with the same token. */
export function passes({ reason, retryDelay }: Refusal): boolean {
  return retryDelay !== undefined || reason === "SETTLE_UNCONFIRMED";
}

/** How long to wait before the next try: at least as long as asked, and longer each time. */
export function backoff({ reason, message, retryDelay }: Refusal, tries: number): number {
  const longest = Math.min(100 * 2 ** tries, PATIENCE);
  const wait = Math.min(millis(retryDelay), PATIENCE) + longest * (0.5 + Math.random() / 2);
  say({ event: "retry", reason, message, in: wait / 1_000 });
  return wait;
}

/** A call as a promise, with the token in its file. */
function call<Request, Answer>(
  method: (
    request: Request,
    metadata: Metadata,
    options: CallOptions,
    callback: (error: ServiceError | null, answer: Answer) => void,
  ) => ClientUnaryCall,
  request: Request,
  timeout: number,
  stop?: AbortSignal,
): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + timeout };
    const call = method(request, credential(), options, (error, answer) => {
      stop?.removeEventListener("abort", cancel);
      if (error) reject(error);
      else resolve(answer);
    });
    const cancel = () => call.cancel();
    stop?.addEventListener("abort", cancel);
  });
}

function credential(): Metadata {
  const metadata = new Metadata();
  const token = content("BEARER_FILE");
  if (token) metadata.set("authorization", `Bearer ${token.toString().trim()}`);
  return metadata;
}

/** The fields of every log line about a message. */
export function about(message: Delivery): object {
  const { streamSequence: sequence, deliveryCount: deliveries } = message;
  return { sequence, deliveries, id: idOf(message) };
}

/** Prints one JSON object per line to standard output. */
export function say(line: object): void {
  process.stdout.write(JSON.stringify(line) + "\n");
}

/** The `id` of the payload, if the payload is a JSON object with an `id`. */
function idOf({ payload }: Delivery): unknown {
  try {
    return (payload?.$case === "text" && JSON.parse(payload.value)?.id) ?? null;
  } catch {
    return null;
  }
}

export function duration(millis: number): Duration {
  return { seconds: Math.floor(millis / 1_000), nanos: Math.floor((millis % 1_000) * 1e6) };
}

export function millis(duration: Duration | undefined): number {
  return duration ? duration.seconds * 1_000 + duration.nanos / 1e6 : 0;
}

/** Ends early on `stop`. A timer cannot wait longer than this. */
export async function pause(wait: number, stop: AbortSignal): Promise<void> {
  await sleep(Math.min(wait, 2 ** 31 - 1), undefined, { signal: stop }).catch(() => undefined);
}
