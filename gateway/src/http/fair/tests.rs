//! A queue and its workers, simulated: what tenants get of them.

use super::*;

const SLOTS: usize = 16;
/// The shortest run, and by how much others are longer.
const RUN_MS: (u64, u64) = (60, 81);
/// What they come to on average.
const RUN_MEAN_MS: u64 = 100;
const GATEWAYS: usize = 2;

/// A queue, first in, first out, and workers that run [`SLOTS`] jobs at once.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<Job>,
    running: Vec<(u64, Job, u64)>,
}

#[derive(Clone, Copy)]
struct Job {
    tenant: usize,
    gateway: usize,
    came: u64,
    published: u64,
    run: u64,
}

const NAMES: [&str; 2] = ["greedy", "modest"];

/// What became of the tenants: how long each job took from when it came, in milliseconds, and how many had no room.
#[derive(Default)]
struct End {
    took: [Vec<u64>; 2],
    full: [u64; 2],
}

/// Jobs a second of each tenant, for 60 s, of which the first 10 are not measured.
fn simulate(rates: [u64; 2], weights: [u32; 2]) -> End {
    let at = Duration::from_millis;
    let mut gateways: Vec<FairShare> = (0..GATEWAYS).map(|i| FairShare::new(&format!("g{i}"))).collect();
    let (mut queue, mut end, mut held) = (Queue::default(), End::default(), BTreeMap::new());
    let mut random = 1u64;
    for now in 0..60_000u64 {
        for tenant in 0..2 {
            {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if (random >> 33) % 1000 >= rates[tenant].min(1000) {
                    continue;
                }
                let gateway = (random >> 20) as usize % GATEWAYS;
                let run = RUN_MS.0 + (random >> 40) % RUN_MS.1;
                let job = Job { tenant, gateway, came: now, published: now, run };
                match gateways[gateway].offer(at(now), NAMES[tenant], weights[tenant]) {
                    Offer::Go => queue.waiting.push_back(job),
                    Offer::Hold(number) => drop(held.insert((gateway, number), job)),
                    Offer::Full => end.full[tenant] += 1,
                }
            }
        }
        let all: Vec<(u64, Job, u64)> = std::mem::take(&mut queue.running);
        let (done, running): (Vec<_>, Vec<_>) = all.into_iter().partition(|run| run.0 <= now);
        queue.running = running;
        for (_, job, started) in done {
            let waited = (started - job.published) as f64;
            gateways[job.gateway].finished(at(now), NAMES[job.tenant], Some((waited, job.run as f64)));
            if now >= 10_000 {
                end.took[job.tenant].push(now - job.came);
            }
        }
        if now % 250 == 0 {
            let reports: Vec<ShareReport> =
                gateways.iter_mut().map(|gateway| gateway.tick(at(now))).collect();
            for gateway in &mut gateways {
                reports.iter().for_each(|report| gateway.hear(at(now), report.clone()));
            }
        }
        for (index, gateway) in gateways.iter_mut().enumerate() {
            for (_, number) in gateway.release() {
                let job = held.remove(&(index, number)).unwrap();
                queue.waiting.push_back(Job { published: now, ..job });
            }
        }
        while queue.running.len() < SLOTS
            && let Some(job) = queue.waiting.pop_front()
        {
            queue.running.push((now + job.run, job, now));
        }
    }
    end.took.iter_mut().for_each(|took| took.sort_unstable());
    end
}

fn p99(sorted: &[u64]) -> u64 {
    sorted[sorted.len() * 99 / 100]
}

#[test]
fn a_greedy_tenant_costs_a_modest_one_little() {
    let alone = simulate([0, 40], [1, 1]);
    // Half of the workers is 80 a second: one asks for ten times its half, the other for half of it.
    let beside = simulate([800, 40], [1, 1]);
    let (before, after) = (p99(&alone.took[1]), p99(&beside.took[1]));
    println!("p99 {before} ms alone, {after} ms beside");
    assert!(after * 100 <= before * 120, "p99 {before} ms alone, {after} ms beside");
    assert_eq!(beside.full[1], 0);
    // The workers stay busy but for what the bursts of the modest one need, and the rest is the greedy one's.
    let all = (beside.took[0].len() + beside.took[1].len()) as u64 * RUN_MEAN_MS;
    assert!(all * 100 >= 50_000 * SLOTS as u64 * 90, "{} % busy", all * 100 / (50_000 * SLOTS as u64));
}

#[test]
fn greedy_tenants_share_by_weight() {
    let end = simulate([800, 800], [1, 3]);
    let [one, three] = [0, 1].map(|tenant| end.took[tenant].len() as f64);
    assert!((2.7..3.3).contains(&(three / one)), "{one} and {three}");
}

#[test]
fn a_tenant_alone_is_not_held_back() {
    let mut share = FairShare::new("g");
    for _ in 0..10_000 {
        assert_eq!(share.offer(Duration::ZERO, "a", 1), Offer::Go);
    }
    share.tick(Duration::from_millis(250));
    assert_eq!((share.offer(Duration::from_millis(300), "a", 1), share.held()), (Offer::Go, 0));
    // Another one is there, at another gateway: from the next tick on the first waits for its turn.
    let demand = TenantDemand { published: 1, held: 0, weight: 1 };
    let tenants = BTreeMap::from([("b".to_owned(), demand)]);
    let report = ShareReport {
        gateway: "h".into(),
        tenants,
        published: 1,
        finished: 10,
        waited_ms: 50_000.0,
        ran_ms: 1_000.0,
    };
    share.hear(Duration::from_millis(300), report);
    share.tick(Duration::from_millis(500));
    assert!(matches!(share.offer(Duration::from_millis(500), "a", 1), Offer::Hold(_)));
    // Who comes new is not.
    assert_eq!(share.offer(Duration::from_millis(500), "b", 1), Offer::Go);
    // The others are gone for a while: all may go.
    share.finished(Duration::from_millis(600), "b", None);
    for second in 1..120 {
        share.tick(Duration::from_secs(second));
    }
    assert!(matches!(share.release().as_slice(), [_]));
}

#[test]
fn what_is_held_back_has_a_bound() {
    let mut share = FairShare::new("g");
    for name in ["a", "b", "c"] {
        assert_eq!(share.offer(Duration::ZERO, name, 1), Offer::Go);
    }
    share.finished(Duration::ZERO, "a", Some((5_000.0, 100.0)));
    share.tick(Duration::ZERO);
    let mut last = 0;
    for name in ["a", "b", "c"] {
        let mut count = 0;
        loop {
            match share.offer(Duration::ZERO, name, 1) {
                Offer::Go => {}
                Offer::Hold(number) => (count, last) = (count + 1, number),
                Offer::Full => break,
            }
        }
        assert!(count <= HELD_OF_TENANT_MAX);
    }
    assert_eq!(share.held(), HELD_MAX);
    let before = share.held();
    share.leave("b", last);
    share.leave("c", last);
    assert!(before - share.held() <= 1, "a number is one tenant's");
}
