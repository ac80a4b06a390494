//! Checkpoints in object stores: what a failing or lying store can do, one call after the other.

use super::super::location::Remote;
use super::*;
use crate::checkpoint::Location;
use async_trait::async_trait;
use futures_core::stream::BoxStream;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, UploadPart,
    memory::InMemory, path::Path as ObjectPath,
};
use std::{
    fmt,
    sync::{Arc, Mutex},
};
use tokio_stream::StreamExt;

const CLASSES: u32 = 12;
const DIRECTORY: &str = "job-0123456789ab/step-0000001234-g3";

/// What goes wrong with one call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Nothing.
    None,
    /// It fails before anything is done.
    Refused,
    /// It is done, and the answer is lost.
    AnswerLost,
    /// It and all after it fail.
    Away,
    /// A byte of what goes up or comes down is another one.
    Corrupts,
    /// A byte of this call and all after it is another one.
    Lies,
}

/// Calls so far, and what they did.
#[derive(Debug, Default)]
struct Log {
    calls: usize,
    /// Names of what was read.
    read: Vec<String>,
    begun: usize,
    completed: usize,
    aborted: usize,
}

/// A store in memory with a fault.
#[derive(Clone, Debug)]
struct Faulty {
    inner: Arc<InMemory>,
    at: usize,
    fault: Fault,
    log: Arc<Mutex<Log>>,
}

type Result<T> = object_store::Result<T>;

impl Faulty {
    fn new(inner: &Arc<InMemory>, at: usize, fault: Fault) -> Self {
        Self {
            inner: inner.clone(),
            at,
            fault,
            log: Arc::default(),
        }
    }

    fn location(&self) -> Location {
        let job = "job-0123456789ab".parse().expect("an id");
        let mut remote = Remote::on(Arc::new(self.clone()), "mem://b/pre", "pre").expect("threads");
        remote.piece = 300;
        Location::remote(remote, &job)
    }

    /// What happens to this call.
    fn call(&self) -> Fault {
        let mut log = self.log.lock().expect("log");
        let number = log.calls;
        log.calls += 1;
        let lasts = matches!(self.fault, Fault::Away | Fault::Lies);
        match number == self.at || lasts && number > self.at {
            true => self.fault,
            false => Fault::None,
        }
    }

    fn note(&self, what: impl FnOnce(&mut Log)) {
        what(&mut self.log.lock().expect("log"));
    }
}

fn lost<T>() -> Result<T> {
    Err(Error::Generic {
        store: "test",
        source: "connection\n reset".into(),
    })
}

/// Does one call as its fault says.
async fn with<T>(fault: Fault, call: impl Future<Output = Result<T>>) -> Result<T> {
    match fault {
        Fault::Refused | Fault::Away => lost(),
        Fault::AnswerLost => call.await.and_then(|_| lost()),
        Fault::None | Fault::Corrupts | Fault::Lies => call.await,
    }
}

fn corrupts(fault: Fault) -> bool {
    matches!(fault, Fault::Corrupts | Fault::Lies)
}

fn flipped(payload: PutPayload, fault: Fault) -> PutPayload {
    let mut bytes: Vec<u8> = payload.iter().flat_map(|piece| piece.to_vec()).collect();
    if corrupts(fault)
        && let Some(last) = bytes.last_mut()
    {
        *last ^= 1;
    }
    bytes.into()
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        name: &ObjectPath,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let fault = self.call();
        with(fault, self.inner.put_opts(name, flipped(payload, fault), options)).await
    }

    async fn put_multipart_opts(
        &self,
        name: &ObjectPath,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let begun = with(self.call(), self.inner.put_multipart_opts(name, options)).await?;
        self.note(|log| log.begun += 1);
        Ok(Box::new(FaultyUpload {
            store: self.clone(),
            inner: begun,
        }))
    }

    async fn get_opts(&self, name: &ObjectPath, options: GetOptions) -> Result<GetResult> {
        let fault = self.call();
        if !options.head {
            self.note(|log| log.read.push(name.filename().unwrap_or_default().to_owned()));
        }
        let head = options.head;
        let got = with(fault, self.inner.get_opts(name, options)).await?;
        if head {
            return Ok(got);
        }
        let (meta, range, attributes, extensions) = (
            got.meta.clone(),
            got.range.clone(),
            got.attributes.clone(),
            got.extensions.clone(),
        );
        let bytes = flipped(got.bytes().await?.into(), fault);
        let bytes = bytes.iter().next().cloned().unwrap_or_default();
        let stream = tokio_stream::once(Ok(bytes));
        Ok(GetResult {
            payload: GetResultPayload::Stream(Box::pin(stream)),
            meta,
            range,
            attributes,
            extensions,
        })
    }

    fn delete_stream(
        &self,
        names: BoxStream<'static, Result<ObjectPath>>,
    ) -> BoxStream<'static, Result<ObjectPath>> {
        let store = self.clone();
        Box::pin(names.then(move |name| {
            let store = store.clone();
            async move {
                let name = name?;
                with(store.call(), store.inner.delete(&name)).await?;
                Ok(name)
            }
        }))
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.call() {
            Fault::None | Fault::Corrupts | Fault::Lies => self.inner.list(prefix),
            Fault::Refused | Fault::AnswerLost | Fault::Away => Box::pin(tokio_stream::once(lost())),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    store: Faulty,
    inner: Box<dyn MultipartUpload>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let fault = self.store.call();
        let part = self.inner.put_part(flipped(data, fault));
        Box::pin(with(fault, part))
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fault = self.store.call();
        let done = with(fault, self.inner.complete()).await;
        if done.is_ok() || fault == Fault::AnswerLost {
            self.store.note(|log| log.completed += 1);
        }
        done
    }

    async fn abort(&mut self) -> Result<()> {
        self.store.note(|log| log.aborted += 1);
        with(self.store.call(), self.inner.abort()).await
    }
}

/// Writes all parts and the manifest; what the rank would commit, or the first error.
fn write_to(
    location: &Location,
    world: u32,
    directory: &str,
) -> std::result::Result<CheckpointManifest, CheckpointError> {
    let mut parts = vec![location.write_part(directory, PartKind::Backbone, &backbone(), &|| {})?];
    for rank in 0..world {
        let classes = ClassRange::of_rank(CLASSES, rank, world);
        parts.push(location.write_part(directory, PartKind::Head(classes), &head(classes), &|| {})?);
    }
    Ok(CheckpointManifest {
        format: manifest::FORMAT,
        job_id: "job-0123456789ab".into(),
        generation: 3,
        step: 1234,
        world_size: world,
        num_classes: CLASSES,
        directory: directory.into(),
        parts,
        ..Default::default()
    })
}

/// What a rank of `world` has after it resumed.
fn resume(
    location: &Location,
    manifest: &CheckpointManifest,
    rank: u32,
    world: u32,
) -> std::result::Result<(), CheckpointError> {
    let classes = ClassRange::of_rank(CLASSES, rank, world);
    let checkpoint = location.open(manifest, classes, &|| {})?;
    assert_same(&checkpoint.backbone()?, &backbone());
    assert_same(&checkpoint.head_rows(classes)?, &head(classes));
    Ok(())
}

fn objects(store: &Arc<InMemory>) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("runtime");
    let mut names: Vec<String> = runtime.block_on(async {
        let found = store.list(None);
        found
            .map(|object| object.expect("listed").location.to_string())
            .collect()
            .await
    });
    names.sort();
    names
}

#[test]
fn a_store_keeps_what_a_directory_keeps() {
    let memory = Arc::new(InMemory::new());
    let store = Faulty::new(&memory, 0, Fault::None);
    let location = store.location();
    location.check().expect("it answers");
    assert_eq!(location.directory("step-0000001234-g3"), DIRECTORY);
    let manifest = write_to(&location, 3, DIRECTORY).expect("written");
    assert_eq!(location.names().expect("listed"), ["step-0000001234-g3"]);
    assert_eq!(location.manifest_of(DIRECTORY).expect("answered"), None);
    location.write_manifest(&manifest).expect("written");
    let found = location.manifest_of(DIRECTORY).expect("answered");
    assert_eq!(found.as_ref(), Some(&manifest));
    let names = [
        "backbone.safetensors",
        "head-0-4.safetensors",
        "head-4-8.safetensors",
        "head-8-12.safetensors",
        manifest::FILE,
    ];
    let all: Vec<_> = names
        .iter()
        .map(|name| format!("pre/{DIRECTORY}/{name}"))
        .collect();
    assert_eq!(objects(&memory), all);
    // The same bytes as in a directory.
    let dir = tempfile::tempdir().expect("scratch");
    let local = write_to(&Location::output(dir.path()), 3, DIRECTORY).expect("written");
    assert_eq!(local, manifest);
    for (rank, world) in [(0, 1), (0, 3), (2, 3), (4, 5), (15, 16)] {
        resume(&location, &manifest, rank, world).expect("whole");
    }
    let log = store.log.lock().expect("log");
    assert!(
        log.begun > 0 && log.begun == log.completed && log.aborted == 0,
        "{log:?}"
    );
}

#[test]
fn a_rank_fetches_the_parts_of_its_classes_alone() {
    let memory = Arc::new(InMemory::new());
    let manifest = write_to(&Faulty::new(&memory, 0, Fault::None).location(), 3, DIRECTORY).expect("written");
    let store = Faulty::new(&memory, 0, Fault::None);
    let alive = Mutex::new(0);
    let classes = ClassRange { lo: 5, hi: 8 };
    let count = || *alive.lock().expect("count") += 1;
    store.location().open(&manifest, classes, &count).expect("whole");
    let mut read = store.log.lock().expect("log").read.clone();
    assert_eq!(
        read.len(),
        *alive.lock().expect("count"),
        "every piece is a sign of life"
    );
    read.dedup();
    assert_eq!(read, ["backbone.safetensors", "head-4-8.safetensors"]);
}

/// Writes with every fault at every call. Whatever happens, what a rank was told is there is there, and no upload stays open.
/// A store that keeps other bytes than it gives back is found out by who resumes.
#[test]
fn what_was_written_with_a_fault_is_whole_or_an_error() {
    let (mut failures, mut successes) = (0, 0);
    for fault in [Fault::Refused, Fault::AnswerLost, Fault::Away, Fault::Corrupts] {
        for at in 0.. {
            let memory = Arc::new(InMemory::new());
            let store = Faulty::new(&memory, at, fault);
            let location = store.location();
            let written = write_to(&location, 2, DIRECTORY);
            let healthy = Faulty::new(&memory, 0, Fault::None).location();
            match written {
                Ok(manifest) => {
                    successes += 1;
                    for rank in 0..2 {
                        resume(&healthy, &manifest, rank, 2).expect("a rank was told that it is there");
                    }
                }
                Err(error) => {
                    failures += 1;
                    let damage = matches!(error, CheckpointError::Digest { .. });
                    assert_eq!(damage, corrupts(fault), "{fault:?} at {at}: {error}");
                    assert!(error.to_string().contains("mem://b/pre/job-"), "{error}");
                    assert!(!error.to_string().contains('\n'), "{error}");
                    healthy.remove(DIRECTORY).expect("removed");
                    assert_eq!(objects(&memory), Vec::<String>::new());
                }
            }
            let log = store.log.lock().expect("log");
            // An upload whose completion was not heard of is aborted too, which does no harm.
            assert!(
                log.completed + log.aborted >= log.begun,
                "{fault:?} at {at}: {log:?}"
            );
            if log.calls <= at {
                break;
            }
        }
    }
    assert!(
        failures > 50 && successes >= 4,
        "{failures} failures, {successes} successes"
    );
}

#[test]
fn what_is_read_with_a_fault_is_whole_or_an_error() {
    let memory = Arc::new(InMemory::new());
    let manifest = write_to(&Faulty::new(&memory, 0, Fault::None).location(), 2, DIRECTORY).expect("written");
    for fault in [
        Fault::Refused,
        Fault::AnswerLost,
        Fault::Away,
        Fault::Corrupts,
        Fault::Lies,
    ] {
        for at in 0.. {
            let store = Faulty::new(&memory, at, fault);
            // Its tensors are compared if it gives any.
            let resumed = resume(&store.location(), &manifest, 1, 3);
            if store.log.lock().expect("log").calls <= at {
                resumed.expect("no fault");
                break;
            }
            match (fault, resumed) {
                // Fetched again.
                (Fault::Corrupts, resumed) => resumed.expect("one wrong byte on the way"),
                // A lie begins with a piece; sizes are told right.
                (Fault::Lies, resumed) => {
                    let error = resumed.expect_err("no part is what was committed");
                    assert!(error.is_damage(), "{error}");
                }
                (_, resumed) => {
                    let error = resumed.expect_err("a call failed");
                    assert!(!error.is_damage(), "{fault:?} at {at} is no damage: {error}");
                    assert!(error.to_string().contains("connection reset"), "{error}");
                }
            }
        }
    }
}

#[test]
fn a_missing_object_is_damage_and_a_store_without_the_job_is_another_store() {
    let memory = Arc::new(InMemory::new());
    let location = Faulty::new(&memory, 0, Fault::None).location();
    let manifest = write_to(&location, 2, DIRECTORY).expect("written");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("runtime");
    let name = ObjectPath::from(format!("pre/{DIRECTORY}/head-6-12.safetensors"));
    let bytes = runtime
        .block_on(async { memory.get(&name).await?.bytes().await })
        .expect("there");
    runtime.block_on(memory.delete(&name)).expect("there");
    let error = resume(&location, &manifest, 1, 2).expect_err("missing");
    assert!(
        error.is_damage()
            && error
                .path()
                .is_some_and(|path| path.ends_with("head-6-12.safetensors")),
        "{error}"
    );
    resume(&location, &manifest, 0, 2).expect("the other rank does not need it");

    runtime
        .block_on(memory.put(&name, bytes.slice(1..).into()))
        .expect("put");
    let error = resume(&location, &manifest, 1, 2).expect_err("short");
    assert!(
        error.is_damage() && matches!(error, CheckpointError::Size { .. }),
        "{error}"
    );

    let empty = Faulty::new(&Arc::new(InMemory::new()), 0, Fault::None).location();
    let error = resume(&empty, &manifest, 1, 2).expect_err("nothing is there");
    assert!(
        !error.is_damage() && error.to_string().contains("nothing at all is in"),
        "{error}"
    );
}

/// A removal that is cut short at any call leaves a whole checkpoint or one without a manifest.
#[test]
fn the_manifest_goes_first() {
    let sibling = "job-0123456789ab/step-0000001234-g31";
    for fault in [Fault::Refused, Fault::AnswerLost, Fault::Away] {
        for at in 0.. {
            let memory = Arc::new(InMemory::new());
            let healthy = Faulty::new(&memory, 0, Fault::None).location();
            for directory in [DIRECTORY, sibling] {
                let manifest = write_to(&healthy, 2, directory).expect("written");
                healthy.write_manifest(&manifest).expect("written");
            }
            let store = Faulty::new(&memory, at, fault);
            let removed = store.location().remove(DIRECTORY);
            let left = objects(&memory);
            let of = |directory: &str| {
                left.iter()
                    .filter(|name| name.contains(&format!("{directory}/")))
                    .count()
            };
            assert_eq!(of(sibling), 4, "{fault:?} at {at}: the one beside it stays");
            let described = left.contains(&format!("pre/{DIRECTORY}/{}", manifest::FILE));
            assert!(!described || of(DIRECTORY) == 4, "{fault:?} at {at}: {left:?}");
            if store.log.lock().expect("log").calls <= at {
                removed.expect("no fault");
                assert_eq!(of(DIRECTORY), 0);
                break;
            }
            removed.expect_err("a call failed");
            healthy.remove(DIRECTORY).expect("the rest goes later");
            healthy.remove(DIRECTORY).expect("one that is gone is no error");
        }
    }
}

#[test]
fn nothing_outside_of_the_place_is_touched() {
    let memory = Arc::new(InMemory::new());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("runtime");
    let other = ObjectPath::from("other/object");
    runtime.block_on(memory.put(&other, "x".into())).expect("put");
    let location = Faulty::new(&memory, 0, Fault::None).location();
    for directory in ["", "/", "/other", "../other", "a/../../other", ".", "a//b", "a/"] {
        let refused = location.remove(directory).expect_err(directory);
        assert!(
            matches!(refused, CheckpointError::Layout { .. }),
            "{directory:?}: {refused}"
        );
        location
            .write_part(directory, PartKind::Backbone, &backbone(), &|| {})
            .expect_err(directory);
    }
    assert_eq!(objects(&memory), ["other/object"]);
}

#[test]
fn numbers_that_are_not_finite_abort_the_upload() {
    let memory = Arc::new(InMemory::new());
    let store = Faulty::new(&memory, 0, Fault::None);
    let mut tensors = backbone();
    tensors.push(("bad".into(), Tensor::from_slice(&[f32::NAN; 100])));
    let error = store
        .location()
        .write_part(DIRECTORY, PartKind::Backbone, &tensors, &|| {})
        .expect_err("NaN");
    assert!(matches!(error, CheckpointError::Tensor { .. }), "{error}");
    let log = store.log.lock().expect("log");
    assert_eq!((log.begun, log.completed, log.aborted), (1, 0, 1));
    assert_eq!(objects(&memory), Vec::<String>::new());
}

#[test]
fn stores_are_found_by_the_environment_alone() {
    let open = |url: &str| Remote::open(&arcface_proto::location::StoreUrl::parse(url).expect("a URL"));
    // TLS has its provider, whoever else has installed it.
    for _ in 0..2 {
        let store = open("s3://faces/runs").expect("a client");
        assert_eq!(store.to_string(), "s3://faces/runs");
    }
    let error = open("file:///srv").expect_err("a directory");
    assert!(error.to_string().contains("no object store"), "{error}");
}
