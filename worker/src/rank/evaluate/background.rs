//! The thread that evaluates: its own copy of the weights, a limited number of threads, and rests in between where training
//! has all cores. It talks to nobody but the rank that started it: what the ranks tell each other goes over the training
//! thread.

use super::best::Best;
use super::shares::{Gathered, Shares};
use super::targets::Target;
use crate::device;
use crate::model::Backbone;
use crate::rank::failure::RankFailure;
use arcface_proto::spec::{EvalSpec, Precision};
use arcface_proto::v1::Evaluation;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};
use tracing::warn;

/// Images in one forward pass: few, so that rests are short and often.
const BATCH: usize = 32;

/// A thread with work that shows no sign of life for so long does not do it any more. Between two signs lie a batch of
/// images, or a part of the numbers of a benchmark.
const SILENT: Duration = Duration::from_secs(600);

/// What a rank's evaluation may take of its node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowance {
    /// Threads that compute.
    pub threads: usize,
    /// Share of the time in which they do, (0, 1].
    pub share: f64,
}

impl Allowance {
    /// On a node of so many cores, with so many ranks of so many training threads each. Cores that training leaves are
    /// free; where they are less than `max_share` of all, or none, an evaluation takes turns with training on its cores.
    pub fn of(spec: &EvalSpec, cores: usize, ranks: usize, training_threads: usize) -> Self {
        let (ranks, all) = (ranks.max(1), training_threads.max(1));
        let free = cores.saturating_sub(ranks * all) as f64 / ranks as f64;
        if !spec.background {
            return Self {
                threads: all,
                share: 1.0,
            };
        }
        if free >= spec.max_share * all as f64 {
            let threads = free.ceil();
            return Self {
                threads: threads as usize,
                share: free / threads,
            };
        }
        Self {
            threads: all,
            share: spec.max_share,
        }
    }

    /// For this process, whose node runs so many ranks.
    pub fn here(spec: &EvalSpec, ranks: u32) -> Self {
        let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        Self::of(spec, device::cores(), ranks as usize, threads)
    }
}

/// What the thread is asked for. The weights go to and fro with it.
pub enum Order {
    /// Embed this rank's share of these targets.
    Embed {
        weights: Backbone,
        which: Vec<usize>,
        shares: Shares,
    },
    /// Make numbers of the embeddings of all images.
    Score {
        weights: Backbone,
        which: Vec<usize>,
        step: u64,
        gathered: Gathered,
    },
}

/// What it answers.
pub enum Answer {
    /// The rank's list of embeddings.
    Embedded { weights: Backbone, list: Vec<f32> },
    /// Numbers by target, and why it is no use to go on, if it is none.
    Scored {
        weights: Backbone,
        found: Vec<Evaluation>,
        stop: Option<String>,
    },
}

/// What the thread knows from its beginning.
pub struct Setting {
    /// All that the job evaluates.
    pub targets: Arc<[Target]>,
    /// This rank.
    pub rank: u32,
    /// Arithmetic of the network.
    pub precision: Precision,
    /// What it may take.
    pub allowance: Allowance,
    /// The best so far, on rank 0 if the job asks for it.
    pub best: Option<Best>,
    /// Where the best weights are kept.
    pub output: PathBuf,
}

/// Told to the thread at any time.
#[derive(Default)]
struct Control {
    /// Training waits: rests help nobody.
    hurry: AtomicBool,
    /// Nobody waits for an answer any more.
    cancelled: AtomicBool,
    /// Signs of life of the thread, counted.
    signs: AtomicU64,
}

/// Watches over the signs of life of a thread. Pure: it is told the time.
#[derive(Clone, Copy, Debug)]
struct Watch {
    seen: u64,
    since: Instant,
}

impl Watch {
    /// Takes note of the signs until `now`; how long there has been none.
    fn silence(&mut self, signs: u64, now: Instant) -> Duration {
        if signs != self.seen {
            *self = Self {
                seen: signs,
                since: now,
            };
        }
        now.saturating_duration_since(self.since)
    }
}

/// The rank's side of the thread. Dropping it does not wait: a batch may take longer than a failing rank may live.
pub struct Background {
    orders: SyncSender<Order>,
    answers: Receiver<Result<Answer, RankFailure>>,
    control: Arc<Control>,
    watch: Watch,
}

impl Background {
    /// Starts the thread.
    pub fn start(setting: Setting) -> Self {
        let (orders, receiver) = sync_channel(1);
        let (sender, answers) = sync_channel(1);
        let (limited, ready) = sync_channel(1);
        let control = Arc::new(Control::default());
        let told = control.clone();
        let threads = tch::get_num_threads();
        std::thread::spawn(move || {
            let count = setting.allowance.threads;
            tch::set_num_threads(i32::try_from(count).unwrap_or(1));
            // Decoding and scores run on the pool of the thread that asks for them.
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(count)
                .use_current_thread()
                .build();
            if let Err(error) = pool {
                warn!("an evaluation beside training takes more than its share: {error}");
            }
            // The rank waits for it just below.
            let _ = limited.send(());
            work(setting, &told, &receiver, &sender);
        });
        if ready.recv().is_ok() {
            // Part of the number is of the whole process: ours is to stay as it was.
            tch::set_num_threads(threads);
        }
        Self {
            orders,
            answers,
            control,
            watch: Watch {
                seen: 0,
                since: Instant::now(),
            },
        }
    }

    /// Asks for something. There is never more than one order without an answer.
    ///
    /// # Errors
    /// If the thread is gone.
    pub fn ask(&mut self, order: Order) -> Result<(), RankFailure> {
        self.watch.since = Instant::now();
        self.orders.send(order).map_err(|_| gone())
    }

    /// The answer, if it has come within `limit`.
    ///
    /// # Errors
    /// What went wrong with the evaluation, or that the thread shows no sign of life.
    pub fn answer(&mut self, limit: Duration) -> Result<Option<Answer>, RankFailure> {
        let answer = match limit.is_zero() {
            true => self.answers.try_recv(),
            false => self.answers.recv_timeout(limit).map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            }),
        };
        match answer {
            Ok(answer) => answer.map(Some),
            Err(TryRecvError::Empty) => {
                let signs = self.control.signs.load(Ordering::Relaxed);
                let silent = self.watch.silence(signs, Instant::now());
                match silent > SILENT {
                    true => Err(stuck(silent)),
                    false => Ok(None),
                }
            }
            Err(TryRecvError::Disconnected) => Err(gone()),
        }
    }

    /// Whether training waits for the thread.
    pub fn hurry(&self, hurry: bool) {
        self.control.hurry.store(hurry, Ordering::Relaxed);
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.control.cancelled.store(true, Ordering::Relaxed);
    }
}

fn gone() -> RankFailure {
    RankFailure::transient("evaluation: its thread ended before its work was done")
}

fn stuck(silent: Duration) -> RankFailure {
    RankFailure::transient(format!(
        "evaluation: no sign of life from its thread for {:.0} s",
        silent.as_secs_f64()
    ))
}

fn work(
    mut setting: Setting,
    control: &Control,
    orders: &Receiver<Order>,
    answers: &SyncSender<Result<Answer, RankFailure>>,
) {
    for order in orders {
        let mut turns = Turns::begin(setting.allowance.share, control);
        let answer = match order {
            Order::Embed {
                weights,
                which,
                shares,
            } => embed(&setting, &weights, &which, &shares, &mut turns)
                .map(|list| Answer::Embedded { weights, list }),
            Order::Score {
                weights,
                which,
                step,
                gathered,
            } => score(&mut setting, &weights, &which, step, gathered, &mut turns).map(|found| {
                let stop = setting.best.as_ref().and_then(Best::stop).map(str::to_owned);
                Answer::Scored { weights, found, stop }
            }),
        };
        if answers.send(answer).is_err() {
            return;
        }
    }
}

/// This rank's list of embeddings.
fn embed(
    setting: &Setting,
    weights: &Backbone,
    which: &[usize],
    shares: &Shares,
    turns: &mut Turns<'_>,
) -> Result<Vec<f32>, RankFailure> {
    let network = weights.for_inference(setting.precision);
    let mut list = Vec::with_capacity(shares.values());
    for (place, &target) in which.iter().enumerate() {
        let own = shares.of_rank(place, setting.rank);
        let found = setting.targets[target].embed(own, BATCH, &mut |images| {
            anyhow::ensure!(turns.rest(), "nobody waits for it any more");
            Ok(network.embed(images))
        })?;
        shares.append(&mut list, place, &found);
    }
    Ok(list)
}

/// The numbers of these targets; keeps the weights if they are the best.
fn score(
    setting: &mut Setting,
    weights: &Backbone,
    which: &[usize],
    step: u64,
    gathered: Gathered,
    turns: &mut Turns<'_>,
) -> Result<Vec<Evaluation>, RankFailure> {
    let mut found = Vec::new();
    for (&target, all) in which.iter().zip(gathered.into_targets()) {
        let numbers = setting.targets[target].score(all, &mut || {
            turns.rest();
        })?;
        found.push(Evaluation { step, ..numbers });
    }
    if let Some(best) = &mut setting.best
        && let Some(value) = best.take(step, &found)
    {
        best.keep(&setting.output, weights, step, value)?;
    }
    Ok(found)
}

/// Work and rest by turns: after a while of work so long a rest that the work has its share of the time, and no more.
struct Turns<'a> {
    share: f64,
    control: &'a Control,
    since: Instant,
}

impl<'a> Turns<'a> {
    fn begin(share: f64, control: &'a Control) -> Self {
        Self {
            share,
            control,
            since: Instant::now(),
        }
    }

    /// Rests for the work since the last rest. False if there is nothing to work for any more.
    fn rest(&mut self) -> bool {
        /// A rest ends within this time of its reason.
        const LOOK: Duration = Duration::from_millis(50);
        self.control.signs.fetch_add(1, Ordering::Relaxed);
        let told = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        let rest = self.since.elapsed().mul_f64((1.0 - self.share) / self.share);
        let end = Instant::now() + rest;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || told(&self.control.hurry) || told(&self.control.cancelled) {
                break;
            }
            std::thread::sleep(left.min(LOOK));
        }
        self.since = Instant::now();
        !told(&self.control.cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arcface_proto::{convert, v1};

    fn spec(background: bool, max_share: f64) -> EvalSpec {
        let wire = v1::JobSpec {
            output: Some("out".into()),
            model: Some(v1::ModelSection {
                network: Some("tiny".into()),
                ..Default::default()
            }),
            data: Some(v1::DataSection {
                rec: Some("/faces".into()),
                ..Default::default()
            }),
            eval: Some(v1::EvalSection {
                background: Some(background),
                max_share: Some(max_share),
                ..Default::default()
            }),
            ..Default::default()
        };
        convert::job_spec(&wire).expect("valid").eval
    }

    #[test]
    fn free_cores_are_used_whole_and_others_by_turns() {
        let beside = |cores, ranks, threads| {
            let found = Allowance::of(&spec(true, 0.25), cores, ranks, threads);
            (found.threads, found.share)
        };
        assert_eq!(beside(2, 1, 1), (1, 1.0), "one core free");
        assert_eq!(beside(2, 2, 1), (1, 0.25), "none free");
        assert_eq!(beside(16, 1, 16), (16, 0.25), "none free");
        assert_eq!(beside(3, 2, 1), (1, 0.5), "two ranks share a free core");
        assert_eq!(beside(16, 2, 7), (7, 0.25), "what is free is less than the share");
        assert_eq!(beside(16, 2, 6), (2, 1.0));
        assert_eq!(beside(2, 8, 1), (1, 0.25), "more ranks than cores");
        let waiting = Allowance::of(&spec(false, 0.25), 2, 1, 1);
        assert_eq!((waiting.threads, waiting.share), (1, 1.0));
    }

    #[test]
    fn only_a_sign_of_life_ends_a_silence() {
        let start = Instant::now();
        let mut watch = Watch {
            seen: 0,
            since: start,
        };
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(watch.silence(0, after(5)).as_secs(), 5);
        assert_eq!(watch.silence(1, after(7)).as_secs(), 0);
        assert_eq!(watch.silence(1, after(700)).as_secs(), 693);
        let control = Control::default();
        assert!(Turns::begin(1.0, &control).rest());
        assert_eq!(control.signs.load(Ordering::Relaxed), 1, "a rest is one");
    }

    #[test]
    fn a_rest_is_as_long_as_the_share_asks_for_and_ends_when_training_waits() {
        let control = Control::default();
        let mut turns = Turns::begin(0.25, &control);
        let work = Instant::now();
        while work.elapsed() < Duration::from_millis(20) {}
        let begin = Instant::now();
        assert!(turns.rest());
        assert!(
            begin.elapsed() >= Duration::from_millis(60),
            "{:?}",
            begin.elapsed()
        );
        control.hurry.store(true, Ordering::Relaxed);
        let mut turns = Turns::begin(1e-6, &control);
        while turns.since.elapsed() < Duration::from_millis(20) {}
        assert!(turns.rest(), "no rest of hours");
        control.cancelled.store(true, Ordering::Relaxed);
        assert!(!turns.rest());
    }
}
