//! Whose turn it is: smooth weighted round robin over the job classes. Pure.
//!
//! Under contention each class gets its weight's share of the jobs pulled, spread evenly; a class without
//! jobs does not hold up the others; and a class with jobs always gets its turn, so none starves.
//! The method is nginx's smooth weighted balancing: every candidate gains its weight, the richest one is
//! taken and pays what all candidates gained.

use millrace_crds::config::ClassWeights;
use millrace_crds::names::Class;

/// One slot per class, in the order of [`Class::ALL`].
pub type PerClass<T> = [T; Class::ALL.len()];

/// The state of the round robin.
#[derive(Debug, Clone)]
pub struct Turns {
    weights: PerClass<i64>,
    credits: PerClass<i64>,
}

impl Turns {
    /// Nobody had a turn yet. A weight of 0 counts as 1: no class may starve.
    pub fn new(weights: &ClassWeights) -> Self {
        let weights = [weights.high, weights.normal, weights.low].map(|w| i64::from(w.max(1)));
        Self { weights, credits: [0; Class::ALL.len()] }
    }

    /// The class whose turn it is among the candidates, if there is a candidate.
    pub fn next(&mut self, candidates: PerClass<bool>) -> Option<Class> {
        let mut gained = 0;
        let mut best: Option<usize> = None;
        for index in (0..Class::ALL.len()).filter(|&i| candidates[i]) {
            gained += self.weights[index];
            self.credits[index] += self.weights[index];
            if best.is_none_or(|b| self.credits[index] > self.credits[b]) {
                best = Some(index);
            }
        }
        let best = best?;
        self.credits[best] -= gained;
        Some(Class::ALL[best])
    }

    /// Shares `slots` among the candidates.
    pub fn share(&mut self, slots: usize, candidates: PerClass<bool>) -> PerClass<usize> {
        let mut shares = [0; Class::ALL.len()];
        for _ in 0..slots {
            match self.next(candidates) {
                Some(class) => shares[class as usize] += 1,
                None => break,
            }
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn turns(high: u32, normal: u32, low: u32) -> Turns {
        Turns::new(&ClassWeights { high, normal, low })
    }

    #[test]
    fn shares_follow_the_weights() {
        assert_eq!(turns(16, 4, 1).share(42, [true; 3]), [32, 8, 2]);
        assert_eq!(turns(16, 4, 1).share(10, [false, true, true]), [0, 8, 2]);
        assert_eq!(turns(16, 4, 1).share(10, [false; 3]), [0; 3]);
        assert_eq!(turns(0, 0, 0).share(3, [true; 3]), [1, 1, 1]);
    }

    proptest! {
        #[test]
        fn any_round_is_exact(high in 1u32..50, normal in 1u32..50, low in 1u32..50, rounds in 1usize..5) {
            let total = (high + normal + low) as usize;
            let shares = turns(high, normal, low).share(total * rounds, [true; 3]);
            prop_assert_eq!(shares, [high, normal, low].map(|w| w as usize * rounds));
        }

        #[test]
        fn none_starves(
            weights in prop::array::uniform3(1u32..50),
            steps in prop::collection::vec(prop::array::uniform3(any::<bool>()), 1..400),
        ) {
            let mut turns = turns(weights[0], weights[1], weights[2]);
            let total: u32 = weights.iter().sum();
            let mut waited = [0u32; 3];
            for candidates in steps {
                let picked = turns.next(candidates);
                prop_assert_eq!(picked.is_some(), candidates.contains(&true));
                for class in Class::ALL {
                    let index = class as usize;
                    if picked == Some(class) {
                        prop_assert!(candidates[index]);
                        waited[index] = 0;
                    } else if candidates[index] {
                        waited[index] += 1;
                    }
                    // Credits never exceed one round's gain, so a wait is bounded by a few rounds.
                    prop_assert!(waited[index] <= 3 * total, "class {} waited {}", class, waited[index]);
                }
            }
        }
    }
}
