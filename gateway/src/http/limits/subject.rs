//! The minute of one key or tenant at this gateway: claims wait for a round, rounds go one after another.
//!
//! One task per key or tenant that is in use does the rounds. All claims that came during one go with the next, so the
//! broker sees a few writes for many requests. A round that finds that somebody else wrote in between is tried again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, oneshot};

use crate::http::limits::book::{Claim, Correction, GatewayBook, LimitRound, LimitRoundEnd};
use crate::http::limits::window::{Amounts, SharedWindow, Shortage, WINDOW_S};
use crate::http::state::{StateBucket, StateWrite};

/// How long a round may take; then each gateway goes on with its own share.
const ROUND_TIMEOUT: Duration = Duration::from_millis(500);
/// How long it goes on so before the broker is asked again.
const ALONE_TIME: Duration = Duration::from_secs(1);
/// Most tries of one round: each that fails means that another gateway got on.
const TRIES_MAX: u32 = 32;
/// Longest pause between two tries, in microseconds.
const TRY_PAUSE_US: u64 = 2_000;
/// Pause between two rounds where something is to be reported.
const REPORT_PAUSE: Duration = Duration::from_millis(100);
/// Pause between two rounds that say no more than that requests run.
const ALIVE_PAUSE: Duration = Duration::from_secs(3);
/// How long a window lives in the broker after its last write.
const WINDOW_TTL: Duration = Duration::from_secs(2 * WINDOW_S);

/// A claim and where its answer goes.
#[derive(Debug)]
struct Ask {
    claim: Claim,
    answer: oneshot::Sender<Result<TakenClaim, Shortage>>,
}

#[derive(Debug)]
struct State {
    book: GatewayBook,
    asks: Vec<Ask>,
    /// Until when the broker is not asked.
    alone_until: Option<Instant>,
    /// Whether a task does rounds.
    working: bool,
}

/// One key or tenant.
#[derive(Debug)]
pub struct LimitSubject {
    key: String,
    bucket: StateBucket,
    state: Mutex<State>,
    wake: Notify,
}

/// A request that was let in, and runs until this is dropped.
#[derive(Debug)]
pub struct TakenClaim {
    subject: Arc<LimitSubject>,
    second: u64,
    amounts: Amounts,
}

impl TakenClaim {
    /// What the request came to; to be said once.
    pub fn settle(&mut self, actual: Amounts) {
        let correction = Correction { second: self.second, reserved: self.amounts, actual };
        self.amounts = actual;
        self.subject.lock().book.correct(now_s(), correction);
        self.subject.work();
    }

    /// As what it counts.
    pub fn amounts(&self) -> Amounts {
        self.amounts
    }
}

impl Drop for TakenClaim {
    fn drop(&mut self) {
        self.subject.lock().book.end(now_s());
        self.subject.work();
    }
}

/// Now, in Unix seconds.
fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl LimitSubject {
    /// `key` is its name in the bucket.
    pub fn new(key: String, bucket: StateBucket, gateway: &str) -> Arc<Self> {
        let book = GatewayBook::new(gateway, now_s());
        let state = State { book, asks: Vec::new(), alone_until: None, working: false };
        Arc::new(Self { key, bucket, state: Mutex::new(state), wake: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a request in, which runs from now on.
    ///
    /// # Errors
    /// [`Shortage`].
    pub async fn take(self: &Arc<Self>, claim: Claim) -> Result<TakenClaim, Shortage> {
        let answer = {
            let (mut state, now) = (self.lock(), now_s());
            if state.book.spend(now, &claim) {
                drop(state);
                self.work();
                return Ok(self.taken(now, &claim));
            }
            if state.alone_until.is_some_and(|until| Instant::now() < until) {
                return state.book.alone(now, &claim).map(|()| self.taken(now, &claim));
            }
            let (sender, answer) = oneshot::channel();
            state.asks.push(Ask { claim, answer: sender });
            answer
        };
        self.work();
        // The task answers each claim, within the time of a round.
        match answer.await {
            Ok(answer) => answer,
            Err(_) => {
                let (mut state, now) = (self.lock(), now_s());
                state.book.alone(now, &claim).map(|()| self.taken(now, &claim))
            }
        }
    }

    fn taken(self: &Arc<Self>, second: u64, claim: &Claim) -> TakenClaim {
        TakenClaim { subject: self.clone(), second, amounts: claim.amounts }
    }

    /// What was let in by all, as far as is known, and the seconds until none of it counts.
    pub fn standing(&self) -> (Amounts, u64) {
        self.lock().book.standing(now_s())
    }

    /// Whether it may be forgotten.
    pub fn is_idle(&self) -> bool {
        let state = self.lock();
        !state.working && state.book.is_idle(now_s())
    }

    /// Sees to it that what is to be said is said.
    fn work(self: &Arc<Self>) {
        if !std::mem::replace(&mut self.lock().working, true) {
            tokio::spawn(self.clone().rounds());
        }
        self.wake.notify_one();
    }

    /// Rounds, for as long as there is something to say.
    async fn rounds(self: Arc<Self>) {
        let mut last = Instant::now();
        loop {
            let begun = {
                let mut state = self.lock();
                let due = !state.asks.is_empty() || state.book.is_due();
                if !due && !state.book.runs() {
                    state.working = false;
                    return;
                }
                let begins = due || last.elapsed() >= ALIVE_PAUSE;
                begins.then(|| (std::mem::take(&mut state.asks), state.book.begin()))
            };
            if let Some((asks, round)) = begun {
                last = Instant::now();
                self.round(asks, round).await;
            }
            self.rest().await;
        }
    }

    /// Until there is a claim, or something to report for a while already.
    async fn rest(&self) {
        let due = self.lock().book.is_due();
        let pause = if due { REPORT_PAUSE } else { ALIVE_PAUSE };
        let woken = async {
            loop {
                {
                    let state = self.lock();
                    if !state.asks.is_empty() || state.book.is_due() != due || !(due || state.book.runs()) {
                        break;
                    }
                }
                self.wake.notified().await;
            }
        };
        let _ = tokio::time::timeout(pause, woken).await;
    }

    /// One round, and the answers to its claims.
    async fn round(self: &Arc<Self>, asks: Vec<Ask>, round: LimitRound) {
        let claims: Vec<Claim> = asks.iter().map(|ask| ask.claim).collect();
        let exchanged = tokio::time::timeout(ROUND_TIMEOUT, self.exchange(&round, &claims)).await;
        let exchanged = exchanged.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        let answers: Vec<Result<u64, Shortage>> = {
            let (mut state, now) = (self.lock(), now_s());
            match exchanged {
                Ok((second, end)) => {
                    state.alone_until = None;
                    state.book.commit(now, &claims, &end);
                    end.taken.into_iter().map(|taken| taken.map(|()| second)).collect()
                }
                Err(reason) => {
                    tracing::warn!(%reason, "limits are not shared for a moment: this gateway keeps to its part");
                    state.book.undo(round);
                    state.alone_until = Some(Instant::now() + ALONE_TIME);
                    claims.iter().map(|claim| state.book.alone(now, claim).map(|()| now)).collect()
                }
            }
        };
        for (ask, answer) in asks.into_iter().zip(answers) {
            // Where nobody waits any more what was taken is dropped, and ends.
            let _ = ask.answer.send(answer.map(|second| self.taken(second, &ask.claim)));
        }
    }

    /// Reads, applies and writes until nobody else wrote in between.
    async fn exchange(&self, round: &LimitRound, claims: &[Claim]) -> Result<(u64, LimitRoundEnd), String> {
        let mut pause = 0;
        for _ in 0..TRIES_MAX {
            let (window, revision): (SharedWindow, u64) = self.bucket.read(&self.key).await?;
            let second = now_s();
            let end = self.lock().book.apply(round, window, second, claims);
            match self.bucket.write(&self.key, &end.window, revision, WINDOW_TTL).await? {
                StateWrite::At(_) => return Ok((second, end)),
                StateWrite::Conflict => {
                    pause = (pause * 2 + 100).min(TRY_PAUSE_US);
                    let mut random = [0; 8];
                    let _ = getrandom::fill(&mut random);
                    let pause = Duration::from_micros(u64::from_le_bytes(random) % pause);
                    tokio::time::sleep(pause).await;
                }
            }
        }
        Err(format!("others wrote first {TRIES_MAX} times"))
    }
}
