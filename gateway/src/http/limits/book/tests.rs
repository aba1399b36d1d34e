//! Three gateways and a broker, simulated: what they let in together.

use proptest::prelude::*;

use super::*;

const LIMIT: u64 = 300;

/// A broker that keeps one window and takes a write only if nobody wrote in between.
#[derive(Default)]
struct Store {
    window: SharedWindow,
    revision: u64,
}

/// A gateway with a round under way.
struct Sim {
    book: GatewayBook,
    flight: Option<(LimitRound, u64, SharedWindow)>,
    asked: Vec<Claim>,
}

impl Sim {
    fn new(name: &str) -> Self {
        Self { book: GatewayBook::new(name, 0), flight: None, asked: Vec::new() }
    }

    /// Reads, or writes what was read; gives how many requests were let in.
    fn step(&mut self, store: &mut Store, now: u64) -> u64 {
        let Some((round, revision, window)) = self.flight.take() else {
            if !self.asked.is_empty() || self.book.is_due() {
                self.flight = Some((self.book.begin(), store.revision, store.window.clone()));
            }
            return 0;
        };
        if revision != store.revision {
            // Somebody was faster: the same round is tried on what is there now.
            self.flight = Some((round, store.revision, store.window.clone()));
            return 0;
        }
        let claims = std::mem::take(&mut self.asked);
        let end = self.book.apply(&round, window, now, &claims);
        (store.window, store.revision) = (end.window.clone(), revision + 1);
        self.book.commit(now, &claims, &end);
        end.taken.iter().filter(|taken| taken.is_ok()).count() as u64
    }
}

fn claim() -> Claim {
    Claim::new(LimitSet { requests: Some(LIMIT), ..LimitSet::default() }, [1, 10, 10])
}

/// Three gateways under these demands, a tenth of a second each; what was let in, by tenth.
fn run(demands: &[[u8; 3]], order: &[usize]) -> Vec<u64> {
    let mut store = Store::default();
    let mut gateways = ["a", "b", "c"].map(Sim::new);
    let mut let_in = Vec::new();
    for (tenth, demand) in demands.iter().enumerate() {
        let now = 1_000 + tenth as u64 / 10;
        let mut count = 0;
        for (gateway, demand) in gateways.iter_mut().zip(demand) {
            for _ in 0..*demand {
                match gateway.book.spend(now, &claim()) {
                    true => count += 1,
                    false => gateway.asked.push(claim()),
                }
            }
        }
        // Each gateway gets on by a few steps, in any order.
        for step in 0..9 {
            let which = order[(tenth * 9 + step) % order.len()] % 3;
            count += gateways[which].step(&mut store, now);
        }
        for gateway in &mut gateways {
            // Nothing runs for long here.
            while gateway.book.runs() {
                gateway.book.end(now);
            }
        }
        let_in.push(count);
    }
    let_in
}

/// The most of any whole minute.
fn most_of_a_minute(let_in: &[u64]) -> u64 {
    let windows = (0..let_in.len()).map(|from| let_in[from..let_in.len().min(from + 600)].iter().sum());
    windows.max().unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever comes to which gateway, and whoever is faster: no minute holds more than the limit.
    #[test]
    fn no_minute_holds_more_than_the_limit(
        demands in prop::collection::vec(prop::array::uniform3(0u8..6), 700..1500),
        order in prop::collection::vec(0usize..3, 30..60),
    ) {
        let let_in = run(&demands, &order);
        prop_assert!(most_of_a_minute(&let_in) <= LIMIT, "{}", most_of_a_minute(&let_in));
    }

    /// Where more is asked for than the limit, a minute holds at least 98 % of it.
    #[test]
    fn a_minute_is_used_up(weights in prop::array::uniform3(0u8..4)) {
        prop_assume!(weights.iter().any(|weight| *weight > 0));
        let demands = vec![weights; 600];
        let total: u64 = run(&demands, &[0, 1, 2, 1, 0, 2]).iter().sum();
        let asked: u64 = weights.iter().map(|weight| u64::from(*weight) * 600).sum();
        prop_assert!(total <= LIMIT && total * 100 >= asked.min(LIMIT) * 98, "{total} of {asked}");
    }
}

#[test]
fn without_the_broker_each_has_its_share() {
    let mut store = Store::default();
    let mut gateways = ["a", "b", "c"].map(Sim::new);
    for gateway in &mut gateways {
        gateway.asked.push(claim());
        gateway.step(&mut store, 1_000);
        gateway.step(&mut store, 1_000);
    }
    // The last to write has seen all three.
    let book = &mut gateways[2].book;
    let let_in = (0..LIMIT).filter(|_| book.alone(1_001, &claim()).is_ok()).count() as u64;
    assert_eq!(let_in, LIMIT / 3 - 1, "one was let in before");
    let refused = book.alone(1_001, &claim()).unwrap_err();
    assert_eq!((refused.limited, refused.limit), (Limited::Requests, LIMIT));
    // What was let in meanwhile is reported once the broker is back.
    gateways[2].step(&mut store, 1_002);
    gateways[2].step(&mut store, 1_002);
    assert_eq!(store.window.used()[0], LIMIT / 3 + 2);
}

#[test]
fn a_round_that_failed_is_reported_later() {
    let mut book = GatewayBook::new("a", 1_000);
    book.alone(1_000, &claim()).unwrap();
    let lost = book.begin();
    book.undo(lost);
    let round = book.begin();
    let end = book.apply(&round, SharedWindow::default(), 1_000, &[claim()]);
    assert_eq!(end.window.used()[0], 2);
    book.commit(1_000, &[claim()], &end);
    assert_eq!(book.standing(1_000), ([2, 20, 20], 61));
    book.correct(1_001, Correction { second: 1_000, reserved: [1, 10, 10], actual: [1, 4, 2] });
    let round = book.begin();
    let end = book.apply(&round, end.window, 1_001, &[]);
    assert_eq!(end.window.used(), [2, 14, 12]);
}

#[test]
fn a_claim_beyond_the_limit_fits_an_empty_minute() {
    let limits = LimitSet { output_tokens: Some(100), ..LimitSet::default() };
    assert_eq!(Claim::new(limits, [1, 5_000, 5_000]).amounts, [1, 5_000, 100]);
}
