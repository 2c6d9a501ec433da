//! The command `work`: its flags become a worker.

use std::time::Duration;

use super::{Outcome, block_on, client_tls, failed, say, usage};
use crate::{
    client::Client,
    config::{OutputArg, ServerArgs, WorkArgs, host_name},
    limits::LONGEST_DELAY,
    pb::GetConsumerRequest,
    simulated::fill_random,
    work::{
        ShownOutput, Work, WorkCommand, WorkPlace, WorkServer, desk::DeskPlan, verdict::DelayGrowth,
    },
};

/// The range of `--grace`. A shorter grace leaves no time for the next stream.
const GRACES: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(3)..=Duration::from_secs(3600);
/// The shortest `--lease`.
const SHORTEST_WORK_LEASE: Duration = Duration::from_secs(1);

/// The time of the work on a message with `--http`, if none is given.
const HTTP_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the worker. The exit code is 0 after a signal, and if it has done as much as it was asked to.
pub(super) fn run(args: WorkArgs) -> Outcome<u8> {
    if !GRACES.contains(&args.grace) {
        return Err(usage("--grace must be from 3s to 1h"));
    }
    if args.lease.is_some_and(|lease| lease < SHORTEST_WORK_LEASE) {
        return Err(usage("--lease must be at least 1s"));
    }
    if args.retry_delay > args.max_retry_delay || args.max_retry_delay > LONGEST_DELAY {
        return Err(usage(
            "--retry-delay must be at most --max-retry-delay, which must be at most 24h",
        ));
    }
    let (would, place) = place(&args)?;
    let addr = args.server.address();
    let ServerArgs { tls, token_file, .. } = args.server;
    let client = Client { addr, tls: client_tls(tls), token_file, json: false };
    if args.dry_run {
        let request = GetConsumerRequest { stream: args.stream, consumer: args.consumer };
        let (text, is_usable) = block_on(client.consumer(request))?;
        return say(&format!("{text}\n{would}")).map(|()| u8::from(!is_usable));
    }
    let mut seed = [0; 8];
    fill_random(&mut seed).map_err(failed)?;
    let plan = DeskPlan {
        stream: args.stream,
        consumer: args.consumer,
        worker: args.worker.unwrap_or_else(|| format!("work on {}", host_name())),
        jobs: args.jobs,
        max: args.max,
        until_empty: args.until_empty,
        grace: args.grace,
        lease: args.lease,
        seed: u64::from_ne_bytes(seed),
    };
    let work = Work {
        client,
        plan,
        place,
        growth: DelayGrowth { first: args.retry_delay, most: args.max_retry_delay },
        reads_delay: args.delay_from_output,
        stop_timeout: args.stop_timeout,
        kill_after: args.kill_after,
        shown: match args.output {
            OutputArg::All => ShownOutput::All,
            OutputArg::Failed => ShownOutput::Failed,
            OutputArg::None => ShownOutput::None,
        },
        json: args.json,
    };
    block_on(work.run()).map(|()| 0)
}

/// The place of the work, and what would be done there.
fn place(args: &WorkArgs) -> Outcome<(String, WorkPlace)> {
    let output_bytes = args.output_bytes as usize;
    let (text, place) = match &args.http {
        Some(url) => {
            let timeout = args.timeout.unwrap_or(HTTP_TIMEOUT);
            let (ca, token_file) = (args.http_ca.as_deref(), args.http_token_file.clone());
            let server = WorkServer::new(url, ca, token_file, timeout, output_bytes);
            (format!("post to {url}"), WorkPlace::Http(server.map_err(usage)?))
        }
        None => {
            let command = args.command.clone();
            let shown = command.join(" ".as_ref()).to_string_lossy().into_owned();
            let command = WorkCommand::new(command, args.timeout, args.kill_after, output_bytes);
            (format!("run {shown}"), WorkPlace::Command(command.map_err(usage)?))
        }
    };
    Ok((format!("would {text}, at most {} at a time", args.jobs), place))
}
