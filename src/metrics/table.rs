//! The one table of the families: name, type, labels and meaning. Counts nothing.
//! `docs/reference/metrics.md` is rendered from here.

/// Times that are short if all is well, in seconds.
const FAST: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// Times that may be long although all is well, in seconds.
const LONG: &[f64] =
    &[0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
/// Numbers of messages.
const COUNT: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

/// The type of a family.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FamilyKind {
    /// It only grows, and starts at 0 with the process.
    Counter,
    /// It is what it is at the scrape.
    Gauge,
    /// Numbers of observations up to each bound.
    Histogram(&'static [f64]),
}

/// One row of the table.
#[derive(Debug)]
pub struct Family {
    /// The name that the row has in code.
    pub id: FamilyId,
    /// The heading under which people find it.
    pub group: &'static str,
    /// The name, for a counter without `_total`: the format adds it.
    pub name: &'static str,
    /// The type.
    pub kind: FamilyKind,
    /// The names of the labels, in the order of their values.
    pub labels: &'static [&'static str],
    /// The meaning, for operators.
    pub help: &'static str,
}

impl Family {
    /// The name by which a query finds it. The series of a histogram add `_bucket`, `_sum` and `_count`.
    pub fn shown(&self) -> String {
        let counter = self.kind == FamilyKind::Counter;
        format!("{}{}", self.name, if counter { "_total" } else { "" })
    }
}

macro_rules! families {
    ($($group:literal { $($id:ident: $kind:ident $(($buckets:ident))? $name:literal [$($label:literal),*] $help:literal;)* })*) => {
        /// The names of the rows in code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum FamilyId {
            $($(#[doc = $help] $id,)*)*
        }

        /// All families, in the order of the page.
        pub const FAMILIES: &[Family] = &[$($(Family {
            id: FamilyId::$id,
            group: $group,
            name: $name,
            kind: FamilyKind::$kind $(($buckets))?,
            labels: &[$($label),*],
            help: $help,
        },)*)*];
    };
}

families! {
    "Calls" {
        GrpcStarted: Counter "grpc_server_started" ["grpc_type", "grpc_service", "grpc_method"]
            "Calls that have begun. A method that is not served is `_OTHER`.";
        GrpcHandled: Counter "grpc_server_handled" ["grpc_type", "grpc_service", "grpc_method", "grpc_code"]
            "Calls that have ended, by their code. `Canceled`: the client went away.";
        GrpcHandling: Histogram(FAST) "grpc_server_handling_seconds" ["grpc_type", "grpc_service", "grpc_method"]
            "From the headers of a call to the end of its answer. A Fetch has a family of its own, and streams have none.";
        FetchTime: Histogram(LONG) "fetchproxy_fetch_seconds" []
            "The same of a Fetch, which waits on purpose.";
        Refusals: Counter "fetchproxy_refusals" ["reason", "rpc"]
            "Calls that were refused, and tokens of a Settle, by the reason that the caller receives. A series begins with its first refusal.";
        CallsOpen: Gauge "fetchproxy_calls_open" []
            "Calls under way, until their answers are written.";
        CallsLimit: Gauge "fetchproxy_calls_limit" []
            "The most calls at once: --max-calls.";
        ConnectionsOpen: Gauge "fetchproxy_connections_open" ["listener"]
            "Connections of clients, with those in their handshake.";
        ConnectionsLimit: Gauge "fetchproxy_connections_limit" ["listener"]
            "The most connections at once. A few more are accepted to be refused.";
        ConnectionsAccepted: Counter "fetchproxy_connections_accepted" ["listener"]
            "Connections that were accepted. Each one is open, was refused or has closed.";
        ConnectionsRefused: Counter "fetchproxy_connections_refused" ["listener", "reason"]
            "Connections on which nothing was served. `silent`: no request began in time.";
        ConnectionsClosed: Counter "fetchproxy_connections_closed" ["listener", "reason"]
            "Connections that have ended. `peer`: by the client, or with it. `unread`: the client did not read its answer. `refusals`: too many calls in a row had no accepted credential. `cut`: by the proxy.";
    }
    "Fetch" {
        Fetches: Counter "fetchproxy_fetches" ["stream", "consumer", "result"]
            "Fetch calls that the rights allow, by how they ended. `left`: the caller went away. `refused`: also if a settlement of the call failed, so that nothing was fetched. A consumer that JetStream does not know counts as `_other`.";
        MessagesFetched: Counter "fetchproxy_messages_fetched" ["stream", "consumer"]
            "Messages that were handed over, and whose answer was written.";
        MessageBytes: Counter "fetchproxy_message_bytes_fetched" ["stream", "consumer"]
            "Payload bytes of messages that were handed over, and whose answer was written.";
        MessagesRedelivered: Counter "fetchproxy_messages_redelivered" ["stream", "consumer"]
            "Messages that were handed over, and that had been delivered before.";
        MessagesRejected: Counter "fetchproxy_messages_rejected" ["stream", "consumer", "cause"]
            "Messages that could not be given as asked.";
        MessagesUnwritten: Counter "fetchproxy_messages_unwritten" ["stream", "consumer"]
            "Messages of answers that were never written. They go to the next Fetch, or back to JetStream.";
        FetchBatch: Histogram(COUNT) "fetchproxy_fetch_batch_messages" []
            "Messages of an answer that has some.";
        DeliveryDelay: Histogram(LONG) "fetchproxy_delivery_delay_seconds" []
            "Age of the first message of an answer, if it is delivered for the first time.";
        ArrivalToAnswer: Histogram(FAST) "fetchproxy_arrival_to_answer_seconds" []
            "From the arrival of the first message of an answer to the answer: what the proxy adds.";
        Waiters: Gauge "fetchproxy_waiters" ["stream", "consumer"]
            "Fetch calls that wait for messages.";
        WaitersLimit: Gauge "fetchproxy_waiters_limit" []
            "The most Fetch calls at once: --max-waiters.";
        PumpWanted: Gauge "fetchproxy_pump_wanted_messages" ["stream", "consumer"]
            "Messages that the waiting calls still want.";
        PumpPulled: Gauge "fetchproxy_pump_pulled_messages" ["stream", "consumer"]
            "Messages that the open pull may still bring. 0: no pull is open.";
        Pulls: Counter "fetchproxy_pulls" ["stream", "consumer", "end"]
            "Pulls that have ended. `full`: it has brought all that it asked for. `spent`: its bytes are used up. `unheard`: its end never came. `lost`: with its connection.";
        Parked: Gauge "fetchproxy_parked_messages" ["stream", "consumer"]
            "Messages that have arrived and wait for a caller.";
    }
    "Leases" {
        Leases: Gauge "fetchproxy_leases" ["stream", "consumer"]
            "Leases that are held here, with those that are being settled.";
        LeasesLimit: Gauge "fetchproxy_leases_limit" []
            "The most leases at once: --max-leases.";
        LeasePlacesFree: Gauge "fetchproxy_leases_places_free" []
            "Leases that may still be granted. Open pulls have reserved others.";
        LeasesGranted: Counter "fetchproxy_leases_granted" ["stream", "consumer"]
            "Leases of messages that arrived here.";
        LeasesAdopted: Counter "fetchproxy_leases_adopted" ["stream", "consumer"]
            "Leases that another replica has handed over. Granted and adopted leases are held, or have ended.";
        LeasesEnded: Counter "fetchproxy_leases_ended" ["stream", "consumer", "how"]
            "Leases that have ended. `lapsed`: the holder did not settle. `lost`: JetStream may have given the message away before that. `overtaken`: the message arrived again. `given_back`: no caller wanted it. `moved`: to another replica.";
        Releases: Counter "fetchproxy_releases" ["stream", "consumer", "why"]
            "Messages that the proxy gave back with a Nak. Each one costs the message an attempt.";
        LeaseHeld: Histogram(LONG) "fetchproxy_lease_held_seconds" ["how"]
            "From the grant or the adoption of a lease to its end.";
        OldestLease: Gauge "fetchproxy_oldest_lease_seconds" []
            "Age of the oldest lease here. 0 without a lease.";
        Progress: Counter "fetchproxy_progress" ["result"]
            "Messages to JetStream that keep a lease alive which is longer than the ack wait.";
    }
    "Settling" {
        Settlements: Counter "fetchproxy_settlements" ["stream", "consumer", "kind", "outcome"]
            "Results of tokens. The replica that holds the lease counts what it published or extended; the replica that was asked counts the rest.";
        SettleTime: Histogram(FAST) "fetchproxy_settle_seconds" ["kind"]
            "From the publishing of the settlements of a call to the last answer of JetStream. One observation for each kind in the call.";
        SettleBatch: Histogram(COUNT) "fetchproxy_settle_batch_messages" []
            "Settlements that are published together.";
    }
    "Replicas" {
        SettlementsRouted: Counter "fetchproxy_settlements_routed" ["route"]
            "Tokens at the replica that was asked. `here`: it has the lease. `forwarded`: another replica has answered. `orphan`: no replica has, and the token was judged without its lease.";
        ForwardTime: Histogram(FAST) "fetchproxy_forward_seconds" []
            "From a request to another replica to its answer.";
        ForwardFailures: Counter "fetchproxy_forward_failures" ["why"]
            "Requests to other replicas without an answer. `nobody`: no replica answers for the lease. `silent`: no answer in time. `unsent`: NATS is away.";
        Replicas: Gauge "fetchproxy_replicas" []
            "Replicas that are heard and share a token key. This replica counts, too.";
        ReplicasDiffering: Gauge "fetchproxy_replicas_differing" ["what"]
            "Other replicas that differ from this replica in their policy, their token keys or their version.";
    }
    "NATS" {
        NatsUp: Gauge "fetchproxy_nats_up" ["role"]
            "1 while this connection is there.";
        NatsConnects: Counter "fetchproxy_nats_connects" ["role"]
            "Connections that were made. A server that leaves causes one, too.";
        NatsLosses: Counter "fetchproxy_nats_losses" ["role"]
            "Connections that were lost.";
        NatsRoundTrip: Histogram(FAST) "fetchproxy_nats_round_trip_seconds" ["role"]
            "Time of a message to ourselves over NATS, sent every 3 s and behind settlements.";
        NatsDenied: Counter "fetchproxy_nats_permission_denied" ["kind"]
            "Subjects that the server refused to the user of the proxy. The log names them.";
        NatsOwnConnections: Gauge "fetchproxy_nats_own_connections" []
            "Consumers with a connection of their own, after a connection broke with their messages.";
        UnreadableTerminated: Counter "fetchproxy_unreadable_terminated" ["stream", "consumer"]
            "Messages that the NATS library cannot read, and that were terminated.";
    }
    "Who" {
        AuthenticationFailures: Counter "fetchproxy_authentication_failures" ["fault"]
            "Calls whose credential was not accepted, by `why` of UNAUTHENTICATED. A series begins with its first call.";
        Denials: Counter "fetchproxy_denials" ["principal", "verb"]
            "Calls and tokens without a right. Principals beyond 200 share `_other`; `_none` has no principal.";
        PrincipalLimited: Counter "fetchproxy_principal_limited" ["principal", "limit"]
            "Calls that were refused by a limit of their principal.";
        PrincipalLeases: Gauge "fetchproxy_principal_leases" ["principal"]
            "Leases that callers of a principal hold here.";
        PrincipalCalls: Gauge "fetchproxy_principal_calls" ["principal"]
            "Calls of a principal under way, with its Fetch calls. Without a policy there are none.";
        PrincipalWaiters: Gauge "fetchproxy_principal_waiters" ["principal"]
            "Open Fetch calls of a principal. Without a policy there are none.";
        FileUnusable: Gauge "fetchproxy_file_unusable" ["file"]
            "1 while a file cannot be used, and what was read before stays in use. `policy` stands for the files that it names, too.";
        TokenKeys: Gauge "fetchproxy_token_keys" ["key", "use"]
            "Always 1, for each token key by its name. `seals`: the key seals new tokens. `opens`: the key only opens tokens.";
        CertificateEnd: Gauge "fetchproxy_certificate_not_after_timestamp_seconds" ["which"]
            "The end of a certificate, in seconds since 1970.";
        IssuerKeysAge: Gauge "fetchproxy_issuer_keys_age_seconds" ["issuer"]
            "Time since the keys of an issuer were fetched. Its tokens are not accepted after a day.";
    }
    "Consumers" {
        Consumers: Gauge "fetchproxy_consumers" []
            "Consumers that this replica serves.";
        ConsumerPending: Gauge "fetchproxy_consumer_pending_messages" ["stream", "consumer"]
            "Messages that JetStream has not delivered yet, as last read. Every replica tells it, so do not add replicas up.";
        ConsumerAckPending: Gauge "fetchproxy_consumer_ack_pending_messages" ["stream", "consumer"]
            "Deliveries that are not settled, to anybody, as last read. Every replica tells it.";
        ConsumerInfoAge: Gauge "fetchproxy_consumer_info_age_seconds" ["stream", "consumer"]
            "Time since these two were read. They are read when there is a reason, not at a scrape.";
    }
    "The process" {
        BuildInfo: Gauge "fetchproxy_build_info" ["version"]
            "Always 1, with the version of the program.";
        Ready: Gauge "fetchproxy_ready" []
            "1 if this replica serves, as /readyz tells.";
        Draining: Gauge "fetchproxy_draining" []
            "1 from the signal to end until the end.";
        Insecure: Gauge "fetchproxy_insecure" []
            "1 if --insecure opens the client port to everybody who reaches it.";
        LogLines: Counter "fetchproxy_log_lines" ["level"]
            "Lines of the log, with those that were lost.";
        LogLinesDropped: Counter "fetchproxy_log_lines_dropped" []
            "Lines of the log that were lost, because the reader of standard error is too slow.";
        Panics: Counter "fetchproxy_panics" []
            "Tasks that have panicked. Each one is a bug.";
        SpansDropped: Counter "fetchproxy_spans_dropped" []
            "Spans that were lost, because the receiver of traces is dead, slow, or refuses them.";
        RuntimeLag: Histogram(FAST) "fetchproxy_runtime_lag_seconds" []
            "How late a timer of 100 ms is. High values mean that the process lacks CPU, or that a task blocks.";
        TokioWorkers: Gauge "tokio_workers" []
            "Threads that run tasks.";
        TokioTasks: Gauge "tokio_tasks_alive" []
            "Tasks that have not ended.";
        TokioQueue: Gauge "tokio_global_queue_depth" []
            "Tasks that wait in the common queue for a thread.";
        TokioBusy: Counter "tokio_worker_busy_seconds" ["worker"]
            "Time in which a thread ran tasks.";
        TokioParks: Counter "tokio_worker_parks" ["worker"]
            "Times that a thread went to sleep for lack of work.";
        ProcessCpu: Counter "process_cpu_seconds" []
            "CPU time of the process, of user and system.";
        ProcessResident: Gauge "process_resident_memory_bytes" []
            "Memory of the process that is in RAM.";
        ProcessVirtual: Gauge "process_virtual_memory_bytes" []
            "Address space of the process.";
        ProcessFds: Gauge "process_open_fds" []
            "Files and sockets that the process has open.";
        ProcessMaxFds: Gauge "process_max_fds" []
            "Files and sockets that the process may have open.";
        ProcessThreads: Gauge "process_threads" []
            "Threads of the process.";
        ProcessStart: Gauge "process_start_time_seconds" []
            "The time at which the process started, in seconds since 1970.";
    }
}
