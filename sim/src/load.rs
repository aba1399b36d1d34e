//! Jobs to replay: the Azure traces of 2023 and synthetic loads.
//!
//! A job is its arrival and its work: the seconds that a worker with nothing else to do, and with all of its
//! slots full of such jobs, would spend on it.

use anyhow::Context;

/// How fast a worker is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Prompt tokens a second.
    pub prompt_tokens_per_s: f64,
    /// Output tokens a second, all slots together.
    pub output_tokens_per_s: f64,
    /// Jobs that run at once. One job takes `slots` times its work, as its share of the worker is one slot.
    pub slots: u32,
    /// From the creation of a pod until it takes jobs.
    pub cold_start_s: f64,
}

/// One GPU with a model of about 70 B parameters.
pub const SPEED: Speed =
    Speed { prompt_tokens_per_s: 4000.0, output_tokens_per_s: 400.0, slots: 16, cold_start_s: 30.0 };

/// One job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SimJob {
    /// When it is published, in milliseconds from the start.
    pub at_ms: u64,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Output tokens.
    pub output_tokens: u32,
}

impl SimJob {
    /// The worker seconds that it costs.
    pub fn work_s(&self, speed: &Speed) -> f64 {
        f64::from(self.prompt_tokens) / speed.prompt_tokens_per_s
            + f64::from(self.output_tokens) / speed.output_tokens_per_s
    }
}

/// Jobs in the order of their arrival.
#[derive(Debug, Clone)]
pub struct Traffic {
    /// A short name.
    pub name: String,
    /// The jobs.
    pub jobs: Vec<SimJob>,
    /// How long the load lasts; workers are paid for at least until then.
    pub length_ms: u64,
    /// The wait target that suits it.
    pub queue_wait_s: u64,
}

impl Traffic {
    /// One hour of code completion at Azure: bursts with silence between them.
    pub fn azure_code() -> anyhow::Result<Self> {
        Self::parse("azure-code", include_str!("../traces/azure-llm-2023-code.csv"))
    }

    /// One hour of conversation at Azure: steady, rising and falling by a factor of two.
    pub fn azure_conv() -> anyhow::Result<Self> {
        Self::parse("azure-conv", include_str!("../traces/azure-llm-2023-conv.csv"))
    }

    fn parse(name: &str, text: &str) -> anyhow::Result<Self> {
        let line = |line: &str| -> Option<SimJob> {
            let mut fields = line.split(',');
            let at_ms = fields.next()?.parse().ok()?;
            let prompt_tokens = fields.next()?.parse().ok()?;
            Some(SimJob { at_ms, prompt_tokens, output_tokens: fields.next()?.parse().ok()? })
        };
        let jobs: Option<Vec<SimJob>> = text.lines().skip(1).map(line).collect();
        let jobs = jobs.with_context(|| format!("the trace {name} has a line that is not three numbers"))?;
        anyhow::ensure!(jobs.is_sorted_by_key(|job| job.at_ms), "the trace {name} is not in order");
        Ok(Self { name: name.into(), jobs, length_ms: 3_600_000, queue_wait_s: 60 })
    }

    /// The jobs of the first `length_ms`.
    pub fn head(&self, length_ms: u64) -> Self {
        let jobs = self.jobs.iter().copied().filter(|job| job.at_ms < length_ms).collect();
        Self { name: format!("{}-head", self.name), jobs, length_ms, queue_wait_s: self.queue_wait_s }
    }

    /// The worker seconds that all jobs cost.
    pub fn work_s(&self, speed: &Speed) -> f64 {
        self.jobs.iter().map(|job| job.work_s(speed)).sum()
    }

    /// Jobs a second that a full worker finishes.
    pub fn worker_rate(&self, speed: &Speed) -> f64 {
        self.jobs.len() as f64 / self.work_s(speed).max(f64::MIN_POSITIVE)
    }

    /// A million jobs at once, to be started within eight hours.
    pub fn nightly() -> Self {
        let mut random = SplitMix64(7);
        let jobs = (0..1_000_000).map(|i| random.job(i / 1_000)).collect();
        Self { name: "nightly-1m".into(), jobs, length_ms: 9 * 3_600_000, queue_wait_s: 8 * 3_600 }
    }

    /// Two jobs a second, then eight, then four, then none, a quarter of an hour each.
    pub fn steps() -> Self {
        Self::of_rates("steps", 3600, |second| [2.0, 8.0, 4.0, 0.0][second as usize / 900])
    }

    /// One job a second, and every ten minutes thirty a second for twenty seconds.
    pub fn spikes() -> Self {
        Self::of_rates("spikes", 3600, |second| if second % 600 < 20 { 30.0 } else { 1.0 })
    }

    /// Six jobs a second for five minutes, then none for ten.
    pub fn on_off() -> Self {
        Self::of_rates("on-off", 5400, |second| if second % 900 < 300 { 6.0 } else { 0.0 })
    }

    /// Poisson arrivals at a rate that changes by the second.
    pub fn of_rates(name: &str, length_s: u64, rate: impl Fn(u64) -> f64) -> Self {
        let mut random = SplitMix64(11);
        let mut jobs = Vec::new();
        for second in 0..length_s {
            let rate = rate(second);
            let mut at_s = random.exponential();
            while at_s < rate {
                jobs.push(random.job(second * 1000 + (at_s / rate * 1000.0) as u64));
                at_s += random.exponential();
            }
        }
        Self { name: name.into(), jobs, length_ms: length_s * 1000, queue_wait_s: 60 }
    }
}

/// A seeded generator: SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Exponential with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    /// A job of 1,000 prompt and 150 output tokens in the mean, exponentially spread, cut at eight times that.
    fn job(&mut self, at_ms: u64) -> SimJob {
        let prompt_tokens = (1000.0 * self.exponential().min(8.0)) as u32 + 1;
        SimJob { at_ms, prompt_tokens, output_tokens: (150.0 * self.exponential().min(8.0)) as u32 + 1 }
    }
}
