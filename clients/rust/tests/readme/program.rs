use fetchproxy::{Client, Error, Failure, Message, Term, Worker};

#[derive(serde::Deserialize)]
struct Mail {
    to: String,
}

async fn send(mail: Message<Mail>) -> Result<(), Failure> {
    if mail.data.to.is_empty() {
        return Err(Term::new("a mail without an address").into());
    }
    println!("mail to {}", mail.data.to); // Your work. It is dropped when the lease is lost.
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let worker = Worker::new(Client::from_env()?, "TASKS", "batch-worker", send);
    worker.concurrency(16).run_until_signal().await
}
