// Refusals of the proxy: read from a status or from a part of an answer, and whether to repeat. Makes no call.

import { BinaryReader } from "@bufbuild/protobuf/wire";
import { status, type ServiceError } from "@grpc/grpc-js";

import type { FetchError, SettleError } from "./gen/fetchproxy/v1/fetch.js";
import { REASONS } from "./reasons.js";
import { millis } from "./time.js";

/** The longest wait before a call is repeated, in milliseconds, besides the wait that the proxy asks for. */
export const PATIENCE = 5_000;

/** A call, or the settlement of a message, failed. "Errors" in the documentation has the reasons. */
export class FetchProxyError extends Error {
  override readonly name = "FetchProxyError";

  constructor(
    /** The reason of the proxy. Without a reason of the proxy: the name of the status code. */
    readonly reason: string,
    /** The gRPC status code. */
    readonly code: status,
    /** A text for people. */
    message: string,
    /** How long the proxy asks to wait before a repeat, in milliseconds. Undefined: a wait does not help. */
    readonly retryDelay?: number,
    /** More of the reason, by name. "Errors" has the names. */
    readonly metadata: Readonly<Record<string, string>> = {},
  ) {
    super(message);
  }

  /** Whether the same call may succeed later. */
  get canRepeat(): boolean {
    if (this.retryDelay !== undefined || this.reason === "SETTLE_UNCONFIRMED") return true;
    return this.reason !== "REQUEST_TOO_LARGE" && !HOPELESS.includes(this.code);
  }

  override toString(): string {
    return `${this.reason}: ${this.message}`;
  }
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

/** Why a call failed. */
export function errorOf(error: unknown): FetchProxyError {
  if (error instanceof FetchProxyError) return error;
  const { code, message, details, metadata } = error as Partial<ServiceError>;
  // A file that cannot be read is an error without metadata. The next try reads the file again.
  const trailer = (name: string) => metadata?.get(name)[0];
  const pushback = trailer("grpc-retry-pushback-ms")?.toString();
  const binary = trailer("grpc-status-details-bin");
  const known = typeof code === "number" ? code : status.UNKNOWN;
  return new FetchProxyError(
    trailer("fetchproxy-reason")?.toString() ?? String((code && status[code]) || code || "UNKNOWN"),
    known,
    details || message || String(error),
    pushback === undefined ? undefined : Number(pushback),
    binary instanceof Uint8Array ? metadataOf(binary) : {},
  );
}

/** Why a part of a call failed. */
export function errorOfPart({ reason, message, metadata, retryDelay }: SettleError | FetchError) {
  // A part with a reason that is not known here is only repeated if the proxy says when.
  const code = REASONS.get(reason) ?? status.FAILED_PRECONDITION;
  const delay = retryDelay && millis(retryDelay);
  return new FetchProxyError(reason, code, message, delay, Object.fromEntries(metadata));
}

/** How long to wait before the next try: at least as long as asked, and longer each time. */
export function backoff({ retryDelay }: FetchProxyError, tries: number): number {
  const longest = Math.min(100 * 2 ** tries, PATIENCE);
  return Math.min(retryDelay ?? 0, PATIENCE) + longest * (0.5 + Math.random() / 2);
}

/** The metadata of `google.rpc.ErrorInfo` in a `google.rpc.Status`. Empty if it cannot be read. */
function metadataOf(binary: Uint8Array): Record<string, string> {
  try {
    for (const detail of fieldsOf(binary, 3)) {
      const [type] = fieldsOf(detail, 1);
      const [info] = fieldsOf(detail, 2);
      if (!info || !type || !textOf(type).endsWith("/google.rpc.ErrorInfo")) continue;
      const pairs = fieldsOf(info, 3).map((pair) =>
        [1, 2].map((field) => textOf(fieldsOf(pair, field)[0] ?? new Uint8Array())),
      );
      return Object.fromEntries(pairs);
    }
  } catch {
    // Something on the way has made the details.
  }
  return {};
}

/** The values of a field that holds bytes, text or messages. */
function fieldsOf(message: Uint8Array, field: number): Uint8Array[] {
  const values: Uint8Array[] = [];
  const reader = new BinaryReader(message);
  while (reader.pos < reader.len) {
    const [number, type] = reader.tag();
    if (number === field && type === 2) values.push(reader.bytes());
    else reader.skip(type, number);
  }
  return values;
}

function textOf(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes);
}
