// Single calls against the fake, the errors that they give, and the addresses that they refuse.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { BinaryWriter } from "@bufbuild/protobuf/wire";
import { Metadata, Server, ServerCredentials, type ServerUnaryCall } from "@grpc/grpc-js";
import { Client, FetchProxyError, Worker, type WorkerEvent } from "fetchproxy";

import { Stage } from "./stage.js";

test("a client fetches, settles and extends", () =>
  Stage.with(
    async ({ fake }) => {
      const records = [1, 2, 3, 4, 5].map((id) => fake.publish({ id }));
      const { client } = fake;
      const { messages, emptyReason } = await client.fetch("TASKS", "worker", {
        n: 10,
        lease: 5_000,
      });
      assert.equal(emptyReason, "");
      assert.deepEqual(
        messages.map(({ data }) => data.toString()),
        [1, 2, 3, 4, 5].map((id) => `{"id":${id}}`),
      );
      const tokens = messages.map(({ token }) => token) as [string, string, string, string, string];
      assert.equal(await client.ack(tokens[0]), "confirmed");
      assert.equal(await client.ack(tokens[0]), "duplicate");
      assert.equal(await client.term(tokens[1], "never"), "confirmed");
      const left = await client.extend(tokens[2], 60_000);
      assert.ok(left > 59_000 && left <= 60_000, String(left));
      const results = await client.settle([
        { token: tokens[2], action: "nak", delay: 1_500 },
        { token: tokens[3], action: "extend" },
        { token: tokens[3], action: "ack" },
        { token: "forged", action: "ack" },
        { token: tokens[1], action: "ack" },
      ]);
      const told = results.map((one) => (one instanceof FetchProxyError ? one.reason : one));
      const refused = ["TOKEN_INVALID", "LEASE_SETTLED"];
      assert.deepEqual(told, ["confirmed", "extended", "confirmed", ...refused]);
      assert.equal(await client.nak(tokens[4], 20), "confirmed");
      assert.deepEqual(
        records.map(({ settlements }) => settlements[0]),
        [
          { action: "ack", attempt: 1 },
          { action: "term", attempt: 1, reason: "never" },
          { action: "nak", attempt: 1, delay: 1_500 },
          { action: "ack", attempt: 1 },
          { action: "nak", attempt: 1, delay: 20 },
        ],
      );
    },
    { maxDeliver: 1 },
  ));

test("a Fetch of an empty queue says why it is empty", () =>
  Stage.with(async ({ fake }) => {
    const { messages, emptyReason } = await fake.client.fetch("TASKS", "worker", { maxWait: 0 });
    assert.deepEqual([messages, emptyReason], [[], "NO_MESSAGES"]);
  }));

test("messages that are given back cost no attempt", () =>
  Stage.with(async ({ fake: { client, publish }, fake }) => {
    const record = publish.call(fake, {});
    const { attemptId } = await client.fetch("TASKS", "worker");
    assert.equal(record.attempts, 1);
    assert.equal(await client.giveBack("TASKS", "worker", attemptId), 1);
    assert.equal(record.attempts, 0);
    assert.equal((await client.fetch("TASKS", "worker")).messages[0]?.deliveryCount, 1);
  }));

test("a Fetch that is cancelled leases nothing", () =>
  Stage.with(async ({ fake }) => {
    const abort = new AbortController();
    const fetching = fake.client.fetch("TASKS", "worker", { signal: abort.signal });
    setTimeout(() => abort.abort(), 50);
    await assert.rejects(fetching, { name: "FetchProxyError", reason: "CANCELLED" });
    const record = fake.publish({});
    assert.equal((await fake.client.fetch("TASKS", "worker")).messages.length, 1);
    assert.equal(record.attempts, 1);
  }));

test("a call that fails for now is made five times at most", () =>
  Stage.with(async ({ fake }) => {
    fake.publish({});
    for (let time = 0; time < 4; time++) fake.fail("Fetch", "NATS_UNAVAILABLE");
    const [message] = (await fake.client.fetch("TASKS", "worker")).messages;
    for (let time = 0; time < 5; time++) fake.fail("Ack", "LEASE_BUSY");
    const acking = fake.client.ack(message!.token);
    await assert.rejects(acking, { reason: "LEASE_BUSY", code: 10, retryDelay: 10 });
    assert.equal(await fake.client.ack(message!.token), "confirmed");
  }));

test("a call that is refused is not repeated", () =>
  Stage.with(async ({ fake }) => {
    fake.fail("Ack", "NOT_ALLOWED");
    await assert.rejects(fake.client.ack("token"), { reason: "NOT_ALLOWED", code: 7 });
    await assert.rejects(fake.client.ack("token"), { reason: "TOKEN_INVALID", code: 3 });
  }));

/** A server whose Ack answers as it is told, and the headers that it got. */
async function withServer(
  answer: (call: ServerUnaryCall<Buffer, Buffer>) => object | null,
  play: (address: string) => Promise<void>,
): Promise<void> {
  const same = (bytes: Buffer) => bytes;
  const server = new Server();
  const definition = {
    path: "/fetchproxy.v1.FetchService/Ack",
    requestStream: false,
    responseStream: false,
    requestSerialize: same,
    requestDeserialize: same,
    responseSerialize: same,
    responseDeserialize: same,
  };
  server.addService(
    { ack: definition },
    { ack: (call: any, reply: any) => reply(answer(call), Buffer.from([8, 1])) },
  );
  const port = await new Promise<number>((resolve) =>
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (_, bound) =>
      resolve(bound),
    ),
  );
  try {
    await play(`127.0.0.1:${port}`);
  } finally {
    server.forceShutdown();
  }
}

test("an error has all that the proxy says", async () => {
  const text = (message: BinaryWriter, field: number, value: string) =>
    message.uint32((field << 3) | 2).string(value);
  const pair = text(text(new BinaryWriter(), 1, "scope"), 2, "principal").finish();
  const info = text(text(new BinaryWriter(), 1, "CALL_LIMIT"), 2, "fetchproxy")
    .uint32(26)
    .bytes(pair);
  const any = text(new BinaryWriter(), 1, "type.googleapis.com/google.rpc.ErrorInfo")
    .uint32(18)
    .bytes(info.finish())
    .finish();
  const metadata = new Metadata();
  metadata.set("fetchproxy-reason", "JETSTREAM_DENIED");
  metadata.set(
    "grpc-status-details-bin",
    Buffer.from(new BinaryWriter().uint32(8).int32(9).uint32(26).bytes(any).finish()),
  );
  const status = { code: 9, details: "the stream is gone", metadata };
  await withServer(
    () => status,
    async (address) => {
      const client = new Client(address);
      await assert.rejects(client.ack("token"), {
        name: "FetchProxyError",
        reason: "JETSTREAM_DENIED",
        code: 9,
        message: "the stream is gone",
        metadata: { scope: "principal" },
        retryDelay: undefined,
      });
      client.close();
    },
  );
});

test("without a proxy, an error has the name of its code", async () => {
  const client = new Client("127.0.0.1:1");
  await assert.rejects(client.giveBack("TASKS", "worker", "attempt"), {
    reason: "UNAVAILABLE",
    code: 14,
  });
  client.close();
});

test("a new bearer in the file goes with the next call", async () => {
  const folder = await mkdtemp(join(tmpdir(), "fetchproxy-"));
  const seen: unknown[] = [];
  const answer = ({ metadata }: ServerUnaryCall<Buffer, Buffer>) => {
    seen.push(...metadata.get("authorization"));
    return null;
  };
  await withServer(answer, async (address) => {
    const bearerFile = join(folder, "bearer");
    const client = new Client(address, { bearerFile });
    for (const bearer of ["one", "two"]) {
      await writeFile(join(folder, "new"), `${bearer}\n`);
      await rename(join(folder, "new"), bearerFile);
      assert.equal(await client.ack("token"), "confirmed");
    }
    client.close();
  });
  await rm(folder, { recursive: true });
  assert.deepEqual(seen, ["Bearer one", "Bearer two"]);
});

test("a bearer is not sent without TLS, except to this machine", () => {
  const files = { bearerFile: "/no/such/file" };
  for (const address of ["proxy.example:50051", "dns:///proxy:50051", "localhost.example:1"])
    assert.throws(() => new Client(address, files), /without TLS: use https:/);
  for (const address of ["https://proxy:50051", "localhost:1", "dns:///127.0.0.1:1", "[::1]:1"])
    new Client(address, files);
});

test("certificates are refused without TLS, and a certificate without its key", () => {
  assert.throws(() => new Client("proxy:50051", { ca: "ca.crt" }), /use https:/);
  assert.throws(() => new Client("https://proxy:50051", { cert: "tls.crt" }), /go together/);
});

test("the environment names the address and the files", () => {
  assert.equal(Client.fromEnv({}).address, "127.0.0.1:50051");
  const env = { FETCH_PROXY_ADDR: "proxy:1", FETCH_PROXY_BEARER_FILE: "bearer" };
  assert.throws(() => Client.fromEnv(env), /proxy:1 without TLS/);
});

test("each reason of the page Errors has its code", () =>
  Stage.with(async ({ fake }) => {
    const page = readFileSync("../../../docs/reference/errors.md", "utf8");
    const rows = [...page.matchAll(/^\| `([A-Z_]+)` \| (\w+) \| .* \| ([\w-]+) \|$/gm)];
    assert.ok(rows.length > 25, "the table is gone");
    const codes = ["Cancelled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound"];
    codes.push("AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition");
    codes.push("Aborted", "OutOfRange", "Unimplemented", "Internal", "Unavailable");
    for (const [, reason, code, wait] of rows) {
      const known = code === "Unauthenticated" ? 16 : codes.indexOf(code!) + 1;
      // The fake refuses a reason that it does not know.
      fake.fail("Fetch", reason!);
      const error = await new Promise<FetchProxyError>((resolve, reject) => {
        const onEvent = (event: WorkerEvent) => {
          if (event.name !== "retry") return;
          resolve(event.error);
          worker.stop();
        };
        const options = { mode: "fetch", onEvent } as const;
        const worker = new Worker(fake.client, "TASKS", "worker", () => undefined, options);
        worker.run().then(() => reject(new Error("no error")), resolve);
      });
      assert.deepEqual([error.reason, error.code], [reason, known]);
      const isRepeated = wait !== "-" || ["SETTLE_UNCONFIRMED", "STREAM_SILENT"].includes(reason!);
      assert.equal(error.canRepeat, isRepeated, reason!);
    }
  }));
