//! Workers that settle a message on the Fetch of the next one: one call a message.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use fetch_proxy::pb;
use testkit::measure::{Half, Processes, Run, half};

use crate::{
    proxied::{Client, acked, connect, fetch},
    setup::Setup,
};

/// `clients` workers that fetch one at a time.
pub async fn singles(setup: &Setup, clients: usize, run: Run) -> Half {
    let clients = connect(&setup.grpc, clients).await;
    singles_of(setup, clients, &setup.proxied(), run).await
}

/// The same with these clients, and with the cost of these processes.
pub async fn singles_of(
    setup: &Setup,
    clients: Vec<Client>,
    processes: &Processes,
    run: Run,
) -> Half {
    let request = fetch(&setup.backlog.consumer().await, 1);
    half(processes, run, async {
        let done = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for mut client in clients {
            let (request, done) = (request.clone(), done.clone());
            tasks.spawn(async move {
                let mut settlements = Vec::new();
                while done.load(Ordering::Relaxed) < run.messages {
                    let request = pb::FetchRequest { settlements, ..request.clone() };
                    let answer = client.fetch(request).await.unwrap().into_inner();
                    assert_eq!((answer.failed, answer.error), (0, None));
                    done.fetch_add(answer.results.len(), Ordering::Relaxed);
                    settlements =
                        answer.messages.into_iter().map(|message| acked(message.token)).collect();
                }
                if !settlements.is_empty() {
                    let last = pb::SettleRequest { settlements, ..Default::default() };
                    let answer = client.settle(last).await.unwrap().into_inner();
                    assert_eq!(answer.failed, 0);
                    done.fetch_add(answer.results.len(), Ordering::Relaxed);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        done.load(Ordering::Relaxed)
    })
    .await
}
