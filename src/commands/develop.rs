//! The commands `dev` and `dev publish`: a service with samples, and more samples.

use std::{env, error::Error, io::Write as _, path::Path};

use super::{Outcome, block_on, say};
use crate::{
    app::{self, BoundAddresses},
    config::{DevArgs, Listen, PublishArgs, Serve, ServeArgs},
    dev::{self, PrivateServer, ServedAt, UsualPort},
    metrics::LogMeter,
};

/// Serves in front of a private server with samples.
pub(super) fn run(args: DevArgs, meter: &LogMeter) -> Outcome<u8> {
    block_on(serve(args, meter)).map(|()| 0)
}

async fn serve(args: DevArgs, meter: &LogMeter) -> Result<(), Box<dyn Error + Send + Sync>> {
    let DevArgs { listen, ops_listen, ports_file, nats_server, nats_port, store_dir, .. } = args;
    let mut taken = Vec::new();
    let mut usual = |port: UsualPort| {
        let free = port.if_free();
        taken.extend(free.is_none().then_some(port));
        free.unwrap_or(0)
    };
    let nats_port = nats_port.unwrap_or_else(|| usual(dev::NATS));
    let mut address = |typed: Option<Listen>, port| {
        typed.unwrap_or_else(|| Listen::Address(([127, 0, 0, 1], usual(port)).into()))
    };
    let (listen, ops_listen) = (address(listen, dev::GRPC), address(ops_listen, dev::OPS));

    let server =
        PrivateServer::start(nats_server.as_deref(), nats_port, store_dir.as_deref()).await?;
    dev::fill(server.url(), args.samples).await?;
    let serve = ServeArgs::of_dev((&listen, &ops_listen), ports_file.as_deref(), server.url())?;
    let serve = Serve::load(serve)?;
    let (nats, tls) = (server.url().to_owned(), serve.tls.is_some());
    let hints = |BoundAddresses { grpc, ops }| {
        let program = env::args().next().unwrap_or_else(|| "fetch-proxy".to_owned());
        let at = ServedAt { grpc, tls, ops, nats: &nats, taken: &taken };
        let grpcurl = args.grpcurl.as_deref().unwrap_or(Path::new("grpcurl"));
        let hints = dev::hints(at, &program, grpcurl);
        // The service must neither stop at a closed terminal nor wait for a blocked terminal.
        let print = move || std::io::stdout().write_all(hints.as_bytes());
        let _ = std::thread::Builder::new().spawn(print);
    };
    app::run(serve, meter, hints).await?;
    Ok(())
}

/// Publishes more samples to the private server of a `dev` that runs.
pub(super) fn publish(PublishArgs { count, nats_url }: &PublishArgs) -> Outcome<u8> {
    let published = block_on(dev::fill(nats_url, *count))?;
    let (first, last) = (dev::subject(*published.start()), dev::subject(*published.end()));
    let to = if first == last { String::new() } else { format!(" to {last}") };
    say(&format!("published {first}{to}")).map(|()| 0)
}
