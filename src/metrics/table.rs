//! The one table of the families: name, type, labels and meaning. Counts nothing.
//! `docs/reference/metrics.md` is rendered from here.

/// Times that are short if all is well, in seconds.
const FAST: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

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
    "The process" {
        BuildInfo: Gauge "fetchproxy_build_info" ["version"]
            "Always 1, with the version of the program.";
        Ready: Gauge "fetchproxy_ready" []
            "1 if this replica serves, as /readyz tells.";
        Draining: Gauge "fetchproxy_draining" []
            "1 from the signal to end until the end.";
        Insecure: Gauge "fetchproxy_insecure" []
            "1 if --insecure opens the port for clients to everybody who reaches it.";
        LogLines: Counter "fetchproxy_log_lines" ["level"]
            "Lines of the log, with those that were lost.";
        LogLinesDropped: Counter "fetchproxy_log_lines_dropped" []
            "Lines of the log that were lost, because the reader of standard error is too slow.";
        Panics: Counter "fetchproxy_panics" []
            "Tasks that have panicked. Each one is a bug.";
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
