//! Loads micro-batches ahead of the training loop, in the order of a plan. Owns the decoding threads; knows the
//! plan only as an iterator.
//!
//! A thread takes the next micro-batch of the plan as a whole, decodes and normalises it and puts it on a shelf by its
//! number; the consumer takes them by number. A thread takes no more than `prefetch` ahead of the consumer, which
//! bounds memory at `prefetch` batches (150 KB an image) and one image a thread.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use arcface_proto::{buckets::DECODE_SECONDS, spec::Augment};
use tch::{Kind, Tensor};

use crate::{device, slices, timings::Timings};

use super::{
    DataError, Dataset, ImageCache, MicroBatch,
    augment::{Appearance, Looks, appearance, flips, mirror},
    decode::{PIXEL_BYTES, Pixels, SIDE},
    planes, read_counted,
};

/// How to load.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Decoding threads, at least 1.
    pub threads: usize,
    /// Random changes.
    pub augment: Augment,
    /// Seed of the random changes.
    pub seed: u64,
    /// Micro-batches kept ready or in work, at least 1.
    pub prefetch: usize,
    /// What becomes of the images.
    pub form: Form,
    /// Where decoded images are kept.
    pub cache: Option<Arc<ImageCache>>,
}

/// The form of a batch's images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `[b, 3, 112, 112]` f32, normalised: what the network takes.
    Planes,
    /// `[b, 112, 112, 3]` u8 in pinned memory, a quarter of the bytes: for a GPU, which changes how they look
    /// ([`Batch::looks`]) and makes planes of them ([`planes::of_pixels`]).
    Pixels,
}

/// A micro-batch on the CPU.
#[derive(Debug)]
pub struct Batch {
    /// In the loader's form, mirrored; b may be 0.
    pub images: Tensor,
    /// How pixels are yet to be changed; planes are made of changed ones.
    pub looks: Option<Looks>,
    /// `[b]` i64, identities over all ranks.
    pub labels: Tensor,
    /// What it is.
    pub micro: MicroBatch,
}

/// A running loader; dropping it stops and joins its threads.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    wait: Duration,
}

type Plan = Box<dyn Iterator<Item = MicroBatch> + Send>;

struct Shared {
    state: Mutex<State>,
    /// Something was put on the shelf, or the plan ended.
    filled: Condvar,
    /// The consumer took something, or stopped.
    taken: Condvar,
    stop: AtomicBool,
    dataset: Arc<dyn Dataset>,
    options: LoaderOptions,
    counts: Counts,
}

/// What the threads count, by image.
struct Counts {
    cached: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    decode: Timings,
}

/// What a loader has done so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Images.
    pub samples: u64,
    /// Of these, images that the cache had: all others were read and decoded.
    pub cached: u64,
    /// Bytes of those, as they lie in the data set; pixels that were drawn count as they are.
    pub bytes: u64,
    /// Records that could not be read.
    pub errors: u64,
    /// Micro-batches that lie ready now.
    pub ready: usize,
    /// Times to read and decode an image: counts and seconds in the buckets of [`DECODE_SECONDS`].
    pub decode: (Vec<u64>, Vec<f64>),
}

struct State {
    /// `None` when it has ended.
    plan: Option<Plan>,
    /// Number of the next micro-batch to take from the plan.
    next: u64,
    /// Number of the next micro-batch to deliver.
    deliver: u64,
    shelf: BTreeMap<u64, Result<Batch, DataError>>,
}

impl Loader {
    /// Starts loading `plan`.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        plan: impl Iterator<Item = MicroBatch> + Send + 'static,
        options: LoaderOptions,
    ) -> Self {
        let threads = options.threads.max(1);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                plan: Some(Box::new(plan)),
                next: 0,
                deliver: 0,
                shelf: BTreeMap::new(),
            }),
            filled: Condvar::new(),
            taken: Condvar::new(),
            stop: AtomicBool::new(false),
            dataset,
            options,
            counts: Counts {
                cached: AtomicU64::new(0),
                bytes: AtomicU64::new(0),
                errors: AtomicU64::new(0),
                decode: Timings::new(DECODE_SECONDS),
            },
        });
        let threads = (0..threads)
            .map(|_| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || work(&shared))
            })
            .collect();
        Self {
            shared,
            threads,
            wait: Duration::ZERO,
        }
    }

    /// How long [`next`](Iterator::next) has waited for data, all calls together.
    pub fn data_wait(&self) -> Duration {
        self.wait
    }

    /// What was loaded so far.
    pub fn loaded(&self) -> Loaded {
        let counts = &self.shared.counts;
        let decode = counts.decode.read();
        let cached = counts.cached.load(Ordering::Relaxed);
        Loaded {
            samples: decode.0.iter().sum::<u64>() + cached,
            cached,
            bytes: counts.bytes.load(Ordering::Relaxed),
            errors: counts.errors.load(Ordering::Relaxed),
            ready: self.shared.lock().shelf.len(),
            decode,
        }
    }
}

impl Iterator for Loader {
    type Item = Result<Batch, DataError>;

    /// The next micro-batch of the plan, or the error of the first of its records that is broken.
    fn next(&mut self) -> Option<Self::Item> {
        let begin = Instant::now();
        let mut state = self.shared.lock();
        let item = loop {
            let number = state.deliver;
            if let Some(item) = state.shelf.remove(&number) {
                state.deliver += 1;
                break Some(item);
            }
            if state.plan.is_none() && number == state.next {
                break None;
            }
            state = wait_on(&self.shared.filled, state);
        };
        drop(state);
        self.shared.taken.notify_all();
        self.wait += begin.elapsed();
        item
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Under the lock, so that no thread is between its check of `stop` and its wait.
        drop(self.shared.lock());
        self.shared.taken.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has put its error on the shelf.
            thread.join().unwrap_or_default();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic half-way runs under the lock but the plan, which is dropped then.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The next micro-batch of the plan, once the consumer is near enough.
    fn take(&self) -> Option<(u64, MicroBatch)> {
        let prefetch = self.options.prefetch.max(1) as u64;
        let mut state = self.lock();
        loop {
            if self.stopped() {
                return None;
            }
            if state.next < state.deliver + prefetch {
                break;
            }
            state = wait_on(&self.taken, state);
        }
        match state.plan.as_mut()?.next() {
            Some(micro) => {
                let number = state.next;
                state.next += 1;
                Some((number, micro))
            }
            None => {
                state.plan = None;
                self.filled.notify_all();
                None
            }
        }
    }

    /// The label of an image, and its pixels before any change: from the cache, or read and decoded.
    fn read(&self, index: u64, pixels: &mut Pixels) -> Result<u32, DataError> {
        let cache = self.options.cache.as_deref();
        if let Some(label) = cache.and_then(|cache| cache.get(index, pixels)) {
            self.counts.cached.fetch_add(1, Ordering::Relaxed);
            return Ok(label);
        }
        let begin = Instant::now();
        let (label, bytes) = read_counted(self.dataset.as_ref(), index, pixels).inspect_err(|_| {
            self.counts.errors.fetch_add(1, Ordering::Relaxed);
        })?;
        self.counts.decode.add(begin.elapsed());
        self.counts.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(cache) = cache {
            cache.keep(index, label, pixels);
        }
        Ok(label)
    }

    fn put(&self, number: u64, item: Result<Batch, DataError>) {
        self.lock().shelf.insert(number, item);
        self.filled.notify_all();
    }
}

fn wait_on<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition
        .wait(state)
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Tells the consumer if the thread dies, which would else wait for ever for what the thread had in hand.
struct Watch<'a> {
    shared: &'a Shared,
    /// The micro-batch in hand: its number, step and micro-batch.
    in_hand: Option<(u64, u64, u32)>,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let mut state = self.shared.lock();
        // Without this thread there may be no other one to go on: what is in work elsewhere is still delivered.
        state.plan = None;
        let (number, step, micro) = self.in_hand.unwrap_or_else(|| {
            state.next += 1;
            (state.next - 1, 0, 0)
        });
        state
            .shelf
            .insert(number, Err(DataError::LoaderDied { step, micro }));
        self.shared.filled.notify_all();
    }
}

fn work(shared: &Shared) {
    let mut watch = Watch {
        shared,
        in_hand: None,
    };
    while let Some((number, micro)) = shared.take() {
        watch.in_hand = Some((number, micro.step, micro.micro));
        match load(shared, micro) {
            Some(item) => shared.put(number, item),
            None => return,
        }
        watch.in_hand = None;
    }
}

/// Loads one micro-batch; `None` when the loader is being dropped.
fn load(shared: &Shared, micro: MicroBatch) -> Option<Result<Batch, DataError>> {
    let options = &shared.options;
    let rows = micro.indices.len();
    let mut pixels = [0u8; PIXEL_BYTES];
    let mut images = Images::new(options.form, rows);
    let mut labels = Vec::with_capacity(rows);
    for (row, &index) in micro.indices.iter().enumerate() {
        if shared.stopped() {
            return None;
        }
        match shared.read(index, &mut pixels) {
            Ok(label) => labels.push(i64::from(label)),
            Err(error) => return Some(Err(error)),
        }
        let look = appearance(options.augment, options.seed, micro.epoch, index);
        let flip = flips(options.augment, options.seed, micro.epoch, index);
        images.set(row, &mut pixels, look, flip);
    }
    let (images, looks) = images.finish();
    Some(Ok(Batch {
        images,
        looks,
        labels: match rows {
            0 => Tensor::zeros([0], (Kind::Int64, tch::Device::Cpu)),
            _ => Tensor::from_slice(&labels),
        },
        micro,
    }))
}

/// A batch's images, which are written where the network or the GPU takes them from.
struct Images {
    form: Form,
    tensor: Tensor,
    /// Of those that are pixels.
    looks: Vec<Appearance>,
}

impl Images {
    fn new(form: Form, rows: usize) -> Self {
        let (rows, side) = (rows as i64, SIDE as i64);
        let tensor = match form {
            // Every row is written before anyone reads.
            Form::Planes => Tensor::empty([rows, 3, side, side], (Kind::Float, tch::Device::Cpu)),
            Form::Pixels => Tensor::empty([rows, side, side, 3], (Kind::Uint8, tch::Device::Cpu)),
        };
        Self {
            form,
            tensor,
            looks: Vec::new(),
        }
    }

    fn set(&mut self, row: usize, pixels: &mut Pixels, look: Appearance, flip: bool) {
        match self.form {
            Form::Planes => {
                look.apply(pixels);
                let images = slices::floats_mut(&mut self.tensor);
                planes::normalise(pixels, flip, &mut images.as_chunks_mut().0[row]);
            }
            Form::Pixels => {
                if flip {
                    mirror(pixels);
                }
                slices::bytes_mut(&mut self.tensor).as_chunks_mut().0[row] = *pixels;
                // Mirrored first: no change knows left from right.
                self.looks.push(look);
            }
        }
    }

    fn finish(self) -> (Tensor, Option<Looks>) {
        match self.form {
            Form::Planes => (self.tensor, None),
            Form::Pixels => (device::pinned(self.tensor), Looks::of(&self.looks)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Image, Pixels, Record, sampler::Epochs, synthetic},
        *,
    };

    /// Image i has all pixels i % 256, or is a face, and has label i; image `broken` is an error, image `panics` a panic.
    struct Numbers {
        len: u64,
        faces: bool,
        broken: Option<u64>,
        panics: Option<u64>,
    }

    impl Dataset for Numbers {
        fn len(&self) -> u64 {
            self.len
        }
        fn num_classes(&self) -> u32 {
            self.len as u32
        }
        fn describe(&self) -> String {
            "numbers".into()
        }
        fn name(&self, index: u64) -> String {
            format!("number {index}")
        }
        fn record(&self, index: u64) -> Result<Record<'_>, DataError> {
            assert!(self.panics != Some(index), "the panic that the test asks for");
            if self.broken == Some(index) {
                return Err(DataError::record(self.name(index), "broken"));
            }
            let mut pixels: Box<Pixels> = Box::new([index as u8; PIXEL_BYTES]);
            if self.faces {
                synthetic::draw(1, index, 0, &mut pixels);
            }
            Ok(Record {
                label: index as u32,
                image: Image::Pixels(pixels),
            })
        }
    }

    fn numbers(len: u64) -> Numbers {
        Numbers {
            len,
            faces: false,
            broken: None,
            panics: None,
        }
    }

    fn loader(dataset: Numbers, threads: usize, prefetch: usize, steps: u64) -> Loader {
        let epochs = Epochs::new(dataset.len, 6, 3).unwrap();
        let options = LoaderOptions {
            threads,
            augment: Augment::Flip,
            seed: 3,
            prefetch,
            form: Form::Planes,
            cache: None,
        };
        Loader::new(Arc::new(dataset), epochs.plan(0, 1, 4, 0..steps), options)
    }

    #[test]
    fn batches_come_in_the_order_of_the_plan() {
        let plan: Vec<_> = Epochs::new(50, 6, 3).unwrap().plan(0, 1, 4, 0..20).collect();
        for (threads, prefetch) in [(1, 1), (3, 2), (4, 9)] {
            let batches: Vec<_> = loader(numbers(50), threads, prefetch, 20)
                .map(Result::unwrap)
                .collect();
            assert_eq!(batches.len(), plan.len());
            for (batch, micro) in batches.iter().zip(&plan) {
                assert_eq!(&batch.micro, micro);
                assert_eq!(batch.images.size(), [micro.indices.len() as i64, 3, 112, 112]);
                let labels = Vec::<i64>::try_from(&batch.labels).unwrap();
                assert!(labels.iter().zip(&micro.indices).all(|(l, i)| *l == *i as i64));
                let last = labels.len() as i64 - 1;
                let expected = (labels[last as usize] as f64 / 255.0 - 0.5) / 0.5;
                assert!((batch.images.double_value(&[last, 2, 111, 0]) - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_broken_record_is_an_error_in_its_place() {
        let order = Epochs::new(12, 6, 3).unwrap();
        let broken = order.position(0, 7);
        let set = Numbers {
            broken: Some(broken),
            ..numbers(12)
        };
        // Micro-batches of 3: positions 6..9 are the third.
        let items: Vec<_> = loader(set, 3, 4, 2).collect();
        let ok: Vec<bool> = items.iter().map(Result::is_ok).collect();
        assert_eq!(ok, [true, true, false, true]);
        assert_eq!(
            items[2].as_ref().unwrap_err().to_string(),
            format!("number {broken}: broken")
        );
    }

    #[test]
    fn what_was_loaded_is_counted() {
        let order = Epochs::new(12, 6, 3).unwrap();
        let set = Numbers {
            broken: Some(order.position(0, 7)),
            ..numbers(12)
        };
        let mut loader = loader(set, 1, 4, 2);
        assert!(loader.next().is_some());
        // One thread, four ahead: once the last one is delivered, it has read everything and nothing lies ready.
        assert_eq!(loader.by_ref().count(), 3);
        let loaded = loader.loaded();
        // The image after the broken one, in the same micro-batch, was not read.
        assert_eq!((loaded.samples, loaded.errors, loaded.ready), (10, 1, 0));
        assert_eq!(loaded.bytes, 10 * PIXEL_BYTES as u64);
        assert!(loaded.decode.1.iter().sum::<f64>() > 0.0, "{loaded:?}");
    }

    #[test]
    fn a_thread_that_dies_is_an_error_and_no_hang() {
        let set = Numbers {
            panics: Some(4),
            ..numbers(12)
        };
        let items: Vec<_> = loader(set, 1, 1, 1000).collect();
        let died = items
            .iter()
            .position(|item| matches!(item, Err(DataError::LoaderDied { .. })));
        assert_eq!(died, Some(items.len() - 1), "the last thing that is delivered");
    }

    /// The second epoch is as it would be without a cache, and nothing is read for it that the cache has.
    #[test]
    fn what_the_cache_has_is_not_read_again() {
        let epochs = Epochs::new(12, 6, 3).unwrap();
        let numbers = |len| Numbers {
            faces: true,
            ..numbers(len)
        };
        let load = |dataset: Numbers, cache: Option<Arc<ImageCache>>, steps| {
            let options = LoaderOptions {
                threads: 2,
                augment: Augment::Dali,
                seed: 3,
                prefetch: 2,
                form: Form::Planes,
                cache,
            };
            let mut loader = Loader::new(Arc::new(dataset), epochs.plan(0, 1, 6, steps), options);
            let batches: Vec<_> = loader.by_ref().map(Result::unwrap).collect();
            (batches, loader.loaded())
        };
        let cache = Arc::new(ImageCache::new(1 << 20));
        let (_, first) = load(numbers(12), Some(cache.clone()), 0..2);
        assert_eq!(
            (first.samples, first.cached, first.bytes),
            (12, 0, 12 * PIXEL_BYTES as u64)
        );
        let unreadable = Numbers {
            panics: Some(5),
            ..numbers(12)
        };
        let (batches, second) = load(unreadable, Some(cache), 2..4);
        assert_eq!((second.samples, second.cached, second.bytes), (12, 12, 0));
        let (without, _) = load(numbers(12), None, 2..4);
        for (batch, without) in batches.iter().zip(&without) {
            assert_eq!(batch.images, without.images);
            assert_eq!(batch.labels, without.labels);
        }
        assert_eq!((batches.len(), without.len()), (2, 2));
    }

    #[test]
    fn dropping_stops_an_endless_plan() {
        let mut endless = loader(numbers(1000), 4, 8, u64::MAX);
        assert!(endless.next().unwrap().is_ok());
        assert!(endless.data_wait() > Duration::ZERO);
        drop(endless);
        drop(loader(numbers(1000), 2, 1, u64::MAX));
    }

    #[test]
    fn an_empty_micro_batch_has_its_shape() {
        let micro = MicroBatch {
            epoch: 0,
            step: 0,
            micro: 0,
            first_position: 0,
            indices: vec![],
        };
        let options = LoaderOptions {
            threads: 1,
            augment: Augment::None,
            seed: 0,
            prefetch: 1,
            form: Form::Planes,
            cache: None,
        };
        let mut loader = Loader::new(Arc::new(numbers(1)), std::iter::once(micro), options);
        let batch = loader.next().unwrap().unwrap();
        assert_eq!(batch.images.size(), [0, 3, 112, 112]);
        assert_eq!(batch.labels.size(), [0]);
        assert!(loader.next().is_none());
    }
}
