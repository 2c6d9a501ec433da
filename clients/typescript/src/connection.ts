// The channel to the proxy: its address, the files of credentials, and one try of each call. Repeats nothing.

import { readFileSync } from "node:fs";
import { isDeepStrictEqual } from "node:util";

import {
  credentials,
  Metadata,
  type CallOptions,
  type ClientDuplexStream,
  type ClientUnaryCall,
  type ServiceError,
} from "@grpc/grpc-js";

import { errorOf, PATIENCE } from "./errors.js";
import {
  FetchServiceClient,
  type AckRequest,
  type AckResponse,
  type ConsumeRequest,
  type ConsumeResponse,
  type ExtendRequest,
  type ExtendResponse,
  type FetchRequest,
  type FetchResponse,
  type GiveBackRequest,
  type GiveBackResponse,
  type NakRequest,
  type NakResponse,
  type SettleRequest,
  type SettleResponse,
  type TermRequest,
  type TermResponse,
} from "./gen/fetchproxy/v1/fetch.js";

/** The largest answer to ask for, in bytes: the contract's limit. */
export const MAX_BYTES = 16 << 20;
/** HTTP/2's own window is 64 KiB, and then a stream waits for the network after each 64 KiB. */
const RECEIVE_WINDOW = 1 << 20;

/** The files of a caller's credentials. They are read again, so a new file counts without a restart. */
export interface CredentialFiles {
  /** PEM: the authorities to trust in place of those of Node.js. Only with `https://`. */
  ca?: string;
  /** PEM: the certificate of this caller, if the proxy asks for a certificate. */
  cert?: string;
  /** PEM: the key of that certificate. */
  key?: string;
  /** An API key or a JSON Web Token, which goes with each call. */
  bearerFile?: string;
}

export interface CallLimits {
  /** The deadline of the call, in milliseconds from now. */
  timeout: number;
  /** Cancels the call. */
  signal?: AbortSignal;
}

type Method<Request, Answer> = (
  request: Request,
  metadata: Metadata,
  options: CallOptions,
  callback: (error: ServiceError | null, answer: Answer) => void,
) => ClientUnaryCall;

export class Connection {
  #client?: FetchServiceClient;
  #pems: (Buffer | undefined)[] = [];

  constructor(
    readonly address: string,
    private readonly files: CredentialFiles,
  ) {
    const isProtected = /^(https:|(dns:\/\/\/)?(localhost|127\.0\.0\.1|\[::1\]):)/;
    if (files.bearerFile && !isProtected.test(address))
      throw new Error(`a credential is not sent to ${address} without TLS: use https://`);
    const pems = files.ca || files.cert || files.key;
    if (pems && !address.startsWith("https://"))
      throw new Error(`${address} is not TLS, so certificates have no use: use https://`);
    if (!files.cert !== !files.key) throw new Error("a certificate and its key go together");
  }

  fetch(request: FetchRequest, limits: CallLimits): Promise<FetchResponse> {
    return this.#call((client) => client.fetch, request, limits);
  }

  settle(request: SettleRequest, limits: CallLimits): Promise<SettleResponse> {
    return this.#call((client) => client.settle, request, limits);
  }

  ack(request: AckRequest, limits: CallLimits): Promise<AckResponse> {
    return this.#call((client) => client.ack, request, limits);
  }

  nak(request: NakRequest, limits: CallLimits): Promise<NakResponse> {
    return this.#call((client) => client.nak, request, limits);
  }

  term(request: TermRequest, limits: CallLimits): Promise<TermResponse> {
    return this.#call((client) => client.term, request, limits);
  }

  extend(request: ExtendRequest, limits: CallLimits): Promise<ExtendResponse> {
    return this.#call((client) => client.extend, request, limits);
  }

  giveBack(request: GiveBackRequest, limits: CallLimits): Promise<GiveBackResponse> {
    return this.#call((client) => client.giveBack, request, limits);
  }

  /** @throws Error if a file of credentials cannot be read. */
  consume(): ClientDuplexStream<ConsumeRequest, ConsumeResponse> {
    return this.#connected().consume(this.#metadata());
  }

  /** Calls that are open may end. */
  close(): void {
    this.#client?.close();
    this.#client = undefined;
  }

  /** One try, as a promise. It rejects with a FetchProxyError. */
  async #call<Request, Answer>(
    method: (client: FetchServiceClient) => Method<Request, Answer>,
    request: Request,
    { timeout, signal }: CallLimits,
  ): Promise<Answer> {
    try {
      const client = this.#connected();
      const metadata = this.#metadata();
      return await new Promise<Answer>((resolve, reject) => {
        const options = { deadline: Date.now() + timeout };
        const call = method(client).call(client, request, metadata, options, (error, answer) => {
          signal?.removeEventListener("abort", cancel);
          if (error) reject(error);
          else resolve(answer);
        });
        const cancel = () => call.cancel();
        if (signal?.aborted) cancel();
        else signal?.addEventListener("abort", cancel);
      });
    } catch (error) {
      throw errorOf(error);
    }
  }

  #metadata(): Metadata {
    const metadata = new Metadata();
    const { bearerFile } = this.files;
    if (bearerFile) {
      const bearer = readFileSync(bearerFile, "utf8").trim();
      metadata.set("authorization", `Bearer ${bearer}`);
    }
    return metadata;
  }

  /** A new certificate makes a new client, for a channel keeps the certificate that it began with. */
  #connected(): FetchServiceClient {
    const { ca, key, cert } = this.files;
    const pems = [ca, key, cert].map((path) => (path ? readFileSync(path) : undefined));
    if (this.#client && isDeepStrictEqual(pems, this.#pems)) return this.#client;
    this.close();
    this.#pems = pems;
    const target = this.address.replace("https://", "");
    const plain = target === this.address;
    const channel = plain ? credentials.createInsecure() : credentials.createSsl(...pems);
    return (this.#client = new FetchServiceClient(target, channel, {
      "grpc.max_receive_message_length": MAX_BYTES + (1 << 20),
      "grpc-node.flow_control_window": RECEIVE_WINDOW,
      "grpc.keepalive_time_ms": 30_000,
      "grpc.keepalive_permit_without_calls": 1,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": PATIENCE,
      // A connection has limits at the proxy, so no other client shares it.
      "grpc.use_local_subchannel_pool": 1,
      "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
      "grpc.service_config_disable_resolution": 1,
    }));
  }
}
