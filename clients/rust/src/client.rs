//! The client: single calls, each with a deadline, and repeated while that may help.

use std::{env, fmt, sync::Arc, time::Duration};

use tokio::{runtime, time};

use crate::{
    Credentials, Error, Message, Rejected,
    connection::{Connection, MAX_BYTES, Proxy},
    error::{PATIENCE, duration_of, to_duration},
    message::Envelope,
    outcome::{cut, delay as delay_of, extend_action, nak_action, term_action},
    pb::{self, AckRequest, ExtendRequest, GiveBackRequest, NakRequest, TermRequest},
};

/// The most tries of a call.
const TRIES: u32 = 5;
/// The first wait before a repeat. It is doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The deadline of a settlement. The proxy answers within 5 s.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// For an answer to the call that gives a Fetch back which was dropped.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(1);

/// One channel to one proxy. Many workers may share it: a clone is the same channel.
#[derive(Clone)]
pub struct Client {
    address: String,
    pub(crate) connection: Arc<Connection>,
}

/// What to fetch.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// The most messages: 1 to 1000. 1 unless set.
    pub n: u32,
    /// The longest wait for a first message: 0 to 5 min. 10 s unless set.
    pub max_wait: Duration,
    /// How long each message is leased: 1 s or more. The ack wait of the consumer unless set.
    pub lease: Option<Duration>,
    /// The most bytes of the answer, 1 KiB to 16 MiB. 16 MiB unless set.
    pub max_bytes: u32,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self { n: 1, max_wait: Duration::from_secs(10), lease: None, max_bytes: MAX_BYTES }
    }
}

/// The answer to a fetch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Fetched {
    /// Each is leased to you. Its payload is not decoded.
    pub messages: Vec<Message<()>>,
    /// Messages that cannot be delivered as asked.
    pub rejected: Vec<Rejected>,
    /// Why there are no messages, such as `NO_MESSAGES`. The page "Errors" has all. Empty: there are messages.
    pub empty_reason: String,
    /// The number of messages that this consumer has not delivered yet.
    pub pending: u64,
    /// The number of messages that are delivered and not settled. 0 if the proxy does not tell.
    pub ack_pending: u64,
    /// The name of this fetch, for [`Client::give_back`].
    pub attempt_id: String,
}

/// The settlement of a message, by its token.
#[derive(Clone, Debug, PartialEq)]
pub enum Settlement {
    /// It is done.
    Ack(String),
    /// It is to be delivered again after this time, at most 24 h.
    Nak(String, Duration),
    /// It is never to be delivered again, for this reason, which is cut to 1 KiB.
    Term(String, String),
    /// Its lease is to last so long from now. `None`: as long as it was granted.
    Extend(String, Option<Duration>),
}

/// The effect of a settlement.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Effect {
    /// JetStream has confirmed it.
    Confirmed,
    /// It is on its way.
    Sent,
    /// It was done before, in the same way.
    Duplicate,
    /// The lease ends later.
    Extended,
}

impl Client {
    /// The address is `host:port`, `https://host:port` with TLS, or `dns:///name:port`. Makes no call yet.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: the address or the files cannot be used, or a bearer would go to another machine without TLS.
    pub fn new(address: &str, files: Credentials) -> Result<Self, Error> {
        let connection = Arc::new(Connection::new(address, files)?);
        Ok(Self { address: address.to_owned(), connection })
    }

    /// Reads `FETCH_PROXY_ADDR` (127.0.0.1:50051 unless set), `FETCH_PROXY_CA`, `FETCH_PROXY_CERT`, `FETCH_PROXY_KEY`
    /// and `FETCH_PROXY_BEARER_FILE`.
    ///
    /// # Errors
    /// The same as of [`Client::new`].
    pub fn from_env() -> Result<Self, Error> {
        let set = |name: &str| {
            env::var_os(format!("FETCH_PROXY_{name}")).filter(|value| !value.is_empty())
        };
        let file = |name: &str| set(name).map(Into::into);
        let address = set("ADDR").map(|address| address.to_string_lossy().into_owned());
        let files = Credentials {
            ca: file("CA"),
            cert: file("CERT"),
            key: file("KEY"),
            bearer_file: file("BEARER_FILE"),
        };
        Self::new(address.as_deref().unwrap_or("127.0.0.1:50051"), files)
    }

    /// Takes messages. An answer that is lost comes again. If the future is dropped, the messages are given back.
    ///
    /// # Errors
    /// The proxy refuses the call, or cannot be reached by five tries.
    pub async fn fetch(
        &self,
        stream: &str,
        consumer: &str,
        options: FetchOptions,
    ) -> Result<Fetched, Error> {
        let attempt_id = new_attempt();
        let FetchOptions { n, max_wait, lease, max_bytes } = options;
        let request = pb::FetchRequest {
            stream: stream.to_owned(),
            consumer: consumer.to_owned(),
            n,
            max_wait: Some(to_duration(max_wait)),
            lease: lease.map(to_duration),
            max_bytes,
            attempt_id: attempt_id.clone(),
            ..pb::FetchRequest::default()
        };
        let mut open =
            Open { client: self, stream, consumer, attempt_id: Some(attempt_id.clone()) };
        let answer = self
            .repeated(max_wait + PATIENCE, request, async |mut proxy: Proxy, mut request, tries| {
                let message: &mut pb::FetchRequest = request.get_mut();
                message.attempt_again = tries > 0;
                proxy.fetch(request).await
            })
            .await;
        open.attempt_id = None;
        let answer = answer?;
        let empty_reason = match answer.empty_reason() {
            pb::EmptyReason::Unspecified => "",
            reason => reason.as_str_name().trim_start_matches("EMPTY_REASON_"),
        };
        Ok(Fetched {
            empty_reason: empty_reason.to_owned(),
            pending: answer.pending,
            ack_pending: answer.ack_pending,
            messages: answer
                .messages
                .into_iter()
                .map(|message| Message::new((), Arc::new(Envelope::of(message))))
                .collect(),
            rejected: answer.rejected.into_iter().map(Rejected::of).collect(),
            attempt_id,
        })
    }

    /// Settles or extends 1 to 1000 messages. The results are in the order of the settlements. A part may fail alone.
    ///
    /// # Errors
    /// The whole call failed.
    pub async fn settle(
        &self,
        settlements: &[Settlement],
    ) -> Result<Vec<Result<Effect, Error>>, Error> {
        let settlements = settlements.iter().map(Settlement::part).collect();
        let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
        let answer = self
            .repeated(SETTLE_TIMEOUT, request, async |mut proxy: Proxy, request, _| {
                proxy.settle(request).await
            })
            .await?;
        let results = answer.results.into_iter().map(|result| match &result.error {
            Some(error) => Err(Error::of_part(error)),
            None => Ok(Effect::of(result.outcome())),
        });
        Ok(results.collect())
    }

    /// The message is done.
    ///
    /// # Errors
    /// The message is not acked, or that is not known.
    pub async fn ack(&self, token: &str) -> Result<Effect, Error> {
        let request = AckRequest { token: token.to_owned(), ..AckRequest::default() };
        let answer =
            self.repeated(SETTLE_TIMEOUT, request, async |mut proxy: Proxy, request, _| {
                proxy.ack(request).await
            });
        Ok(Effect::of(answer.await?.outcome()))
    }

    /// The message is to be delivered again, after `delay`: at most 24 h, and a longer delay is lowered.
    ///
    /// # Errors
    /// The message is not settled, or that is not known.
    pub async fn nak(&self, token: &str, delay: Duration) -> Result<Effect, Error> {
        let (token, delay) = (token.to_owned(), Some(delay_of(delay)));
        let request = NakRequest { token, delay, ..NakRequest::default() };
        let answer =
            self.repeated(SETTLE_TIMEOUT, request, async |mut proxy: Proxy, request, _| {
                proxy.nak(request).await
            });
        Ok(Effect::of(answer.await?.outcome()))
    }

    /// The message is never to be delivered again. The reason is cut to 1 KiB.
    ///
    /// # Errors
    /// The message is not settled, or that is not known.
    pub async fn term(&self, token: &str, reason: &str) -> Result<Effect, Error> {
        let (token, reason) = (token.to_owned(), cut(reason));
        let request = TermRequest { token, reason, ..TermRequest::default() };
        let answer =
            self.repeated(SETTLE_TIMEOUT, request, async |mut proxy: Proxy, request, _| {
                proxy.term(request).await
            });
        Ok(Effect::of(answer.await?.outcome()))
    }

    /// The lease is to last for `lease` from now: at least 1 s. `None`: as long as it was granted. The answer is how
    /// long it lasts.
    ///
    /// # Errors
    /// The lease is lost, or the proxy cannot be reached by five tries.
    pub async fn extend(&self, token: &str, lease: Option<Duration>) -> Result<Duration, Error> {
        let request = ExtendRequest { token: token.to_owned(), lease: lease.map(to_duration) };
        let answer =
            self.repeated(SETTLE_TIMEOUT, request, async |mut proxy: Proxy, request, _| {
                proxy.extend(request).await
            });
        Ok(answer.await?.lease.map(duration_of).unwrap_or_default())
    }

    /// Gives back all that a fetch has leased. The answer is the number of messages.
    ///
    /// # Errors
    /// The proxy refuses the call, or cannot be reached by five tries.
    pub async fn give_back(
        &self,
        stream: &str,
        consumer: &str,
        attempt_id: &str,
    ) -> Result<u32, Error> {
        let request = GiveBackRequest {
            stream: stream.to_owned(),
            consumer: consumer.to_owned(),
            attempt_id: attempt_id.to_owned(),
        };
        let answer =
            self.repeated(SETTLE_TIMEOUT, request, async |mut proxy: Proxy, request, _| {
                proxy.give_back(request).await
            });
        Ok(answer.await?.messages)
    }

    /// Waits between the tries: for as long as the proxy asks, and longer each time.
    async fn repeated<Q: Clone, A>(
        &self,
        timeout: Duration,
        message: Q,
        call: impl AsyncFn(Proxy, tonic::Request<Q>, u32) -> Result<tonic::Response<A>, tonic::Status>,
    ) -> Result<A, Error> {
        let mut tries = 0;
        loop {
            let once = async |proxy, request| call(proxy, request, tries).await;
            let error = match self.connection.within(timeout, message.clone(), once).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if !error.can_repeat() || tries + 1 == TRIES {
                return Err(error);
            }
            let asked = error.retry_delay.unwrap_or_default();
            time::sleep(asked + FIRST_WAIT * 2_u32.pow(tries)).await;
            tries += 1;
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Settlement {
    fn part(&self) -> pb::Settlement {
        let (token, action) = match self {
            Self::Ack(token) => (token, pb::settlement::Action::Ack(pb::AckAction {})),
            Self::Nak(token, delay) => (token, nak_action(*delay)),
            Self::Term(token, reason) => (token, term_action(reason)),
            Self::Extend(token, lease) => (token, extend_action(*lease)),
        };
        pb::Settlement { token: token.clone(), action: Some(action), number: 0 }
    }
}

impl Effect {
    fn of(outcome: pb::Outcome) -> Self {
        match outcome {
            pb::Outcome::Sent => Self::Sent,
            pb::Outcome::Duplicate => Self::Duplicate,
            pb::Outcome::Extended => Self::Extended,
            pb::Outcome::Confirmed | pb::Outcome::Unspecified => Self::Confirmed,
        }
    }
}

/// A fetch under way. If it is dropped, a task gives its messages back.
struct Open<'a> {
    client: &'a Client,
    stream: &'a str,
    consumer: &'a str,
    /// `None`: it is over.
    attempt_id: Option<String>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let (Some(attempt_id), Ok(runtime)) =
            (self.attempt_id.take(), runtime::Handle::try_current())
        else {
            return;
        };
        let (stream, consumer) = (self.stream.to_owned(), self.consumer.to_owned());
        let connection = self.client.connection.clone();
        runtime.spawn(async move {
            let request = GiveBackRequest { stream, consumer, attempt_id };
            let call = async |mut proxy: Proxy, request| proxy.give_back(request).await;
            // If this fails, the messages come back when their leases end.
            drop(connection.within(GIVE_BACK_TIMEOUT, request, call).await);
        });
    }
}

/// A name that no other fetch has.
pub(crate) fn new_attempt() -> String {
    format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}
