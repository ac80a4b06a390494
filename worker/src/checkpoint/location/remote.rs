//! A place in an object store: the connection, names, listing and removal. Everything async ends here: callers wait.

use super::super::{CheckpointError, manifest};
use arcface_proto::{
    location::{Scheme, StoreUrl},
    v1::CheckpointManifest,
};
use object_store::{
    BackoffConfig, Error, ObjectStore, ObjectStoreExt, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, path::Path as ObjectPath,
};
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;
use tracing::info;

/// How long one request is tried again: through a store's bad minute, not through its bad hour. Training goes on meanwhile,
/// and the next checkpoint may find it well.
const RETRY: RetryConfig = RetryConfig {
    backoff: BackoffConfig {
        init_backoff: Duration::from_millis(200),
        max_backoff: Duration::from_secs(10),
        base: 2.0,
    },
    max_retries: 8,
    retry_timeout: Duration::from_secs(60),
};

/// Bytes of one request; larger objects go in several.
const PIECE: u64 = 16 << 20;

/// Transfers say how far they are whenever so many bytes have gone.
const NEWS: u64 = 1 << 30;

/// A bucket or container, and the start of all names in it.
pub struct Remote {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) runtime: Runtime,
    /// Bytes of one request; larger objects go in several.
    pub(in super::super) piece: u64,
    url: String,
    prefix: String,
}

impl Remote {
    /// The place that a job file names. Endpoint, region and credentials come from the environment, under the names
    /// that the providers' own tools use. Nothing is sent yet.
    ///
    /// # Errors
    /// If the environment does not make sense, or `url` names a directory.
    pub fn open(url: &StoreUrl) -> Result<Self, CheckpointError> {
        // Another part of the process may have done it: there is one provider in the program.
        let _there = rustls::crypto::ring::default_provider().install_default();
        let container = url.container();
        let built: Result<Arc<dyn ObjectStore>, Error> = match url.scheme() {
            Scheme::S3 => AmazonS3Builder::from_env()
                .with_bucket_name(container)
                .with_retry(RETRY)
                .build()
                .map(|store| Arc::new(store) as _),
            Scheme::Gs => GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(container)
                .with_retry(RETRY)
                .build()
                .map(|store| Arc::new(store) as _),
            Scheme::Az => MicrosoftAzureBuilder::from_env()
                .with_container_name(container)
                .with_retry(RETRY)
                .build()
                .map(|store| Arc::new(store) as _),
            Scheme::File => {
                let detail = "a directory is no object store";
                return Err(CheckpointError::layout(Path::new(&url.to_string()), detail));
            }
        };
        let refused = |error: Error| CheckpointError::Store {
            operation: "open",
            path: url.to_string().into(),
            detail: one_line(&error),
            gone: false,
        };
        Self::on(built.map_err(refused)?, &url.to_string(), url.path())
    }

    /// A store that the caller has made; `url` is its name in messages, `prefix` the start of all names.
    ///
    /// # Errors
    /// If no threads can be started.
    pub fn on(store: Arc<dyn ObjectStore>, url: &str, prefix: &str) -> Result<Self, CheckpointError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("checkpoint-store")
            .enable_all()
            .build()
            .map_err(CheckpointError::io("start threads for", Path::new(url), 0))?;
        Ok(Self {
            store,
            runtime,
            piece: PIECE,
            url: url.to_owned(),
            prefix: prefix.to_owned(),
        })
    }

    /// Whether there is anything in a folder.
    pub fn any(&self, folder: &str) -> Result<bool, CheckpointError> {
        let name = self.name(folder, "")?;
        let mut found = self.store.list(Some(&name));
        let first = self.runtime.block_on(found.next()).transpose();
        let first = first.map_err(|error| self.failed("list", folder, "", &error))?;
        Ok(first.is_some())
    }

    /// Puts a committed manifest beside its parts, all or nothing.
    pub(super) fn write_manifest(&self, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
        let directory = &manifest.directory;
        let name = self.name(directory, manifest::FILE)?;
        let text = manifest::to_json(manifest).map_err(|error| {
            CheckpointError::layout(&self.path(directory, manifest::FILE), error.to_string())
        })?;
        let put = self.runtime.block_on(self.store.put(&name, text.into()));
        put.map(drop)
            .map_err(|error| self.failed("write", directory, manifest::FILE, &error))
    }

    /// Removes a checkpoint: the manifest first, so that what is left after a failure is no checkpoint. One that is gone
    /// already is no error.
    pub(super) fn remove(&self, directory: &str) -> Result<(), CheckpointError> {
        let manifest = self.name(directory, manifest::FILE)?;
        let all = self.name(directory, "")?;
        let failed = |error| self.failed("remove", directory, "", &error);
        self.runtime.block_on(async {
            gone_is_fine(self.store.delete(&manifest).await).map_err(failed)?;
            let found = self.store.list(Some(&all));
            let names: Vec<_> = found.map(|object| Ok(object?.location)).collect().await;
            let mut removed = self.store.delete_stream(Box::pin(tokio_stream::iter(names)));
            while let Some(result) = removed.next().await {
                gone_is_fine(result.map(drop)).map_err(failed)?;
            }
            Ok(())
        })
    }

    /// Names of the checkpoints in a folder.
    pub(super) fn names(&self, folder: &str) -> Result<Vec<String>, CheckpointError> {
        let all = self.name(folder, "")?;
        let found = self.runtime.block_on(self.store.list_with_delimiter(Some(&all)));
        let found = found.map_err(|error| self.failed("list", folder, "", &error))?;
        let names = found.common_prefixes.into_iter();
        Ok(names
            .filter_map(|name| name.filename().map(str::to_owned))
            .collect())
    }

    /// The manifest of a checkpoint; none if there is none.
    pub(super) fn manifest_of(&self, directory: &str) -> Result<Option<CheckpointManifest>, CheckpointError> {
        let name = self.name(directory, manifest::FILE)?;
        let found = self
            .runtime
            .block_on(async { self.store.get(&name).await?.bytes().await });
        match found {
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("read", directory, manifest::FILE, &error)),
            Ok(text) => manifest::parse(&self.path(directory, manifest::FILE), &text).map(Some),
        }
    }

    /// Removes one object that is of no use. Nothing can be done about a failure: the error that led here is on its way.
    pub(super) fn discard(&self, name: &ObjectPath) {
        drop(self.runtime.block_on(self.store.delete(name)));
    }

    /// Name of an object, or of a folder if `file` is empty. Never outside of this place.
    pub(super) fn name(&self, directory: &str, file: &str) -> Result<ObjectPath, CheckpointError> {
        let refused = || {
            let path = self.path(directory, file);
            CheckpointError::layout(&path, "a checkpoint's directory is relative, without \"..\"")
        };
        if directory.is_empty() || directory.starts_with('/') {
            return Err(refused());
        }
        let parts = [&self.prefix, directory, file];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        // Refuses empty parts, "." and "..".
        ObjectPath::parse(parts.join("/")).map_err(|_| refused())
    }

    /// The same for messages.
    pub(super) fn path(&self, directory: &str, file: &str) -> PathBuf {
        let separator = if file.is_empty() { "" } else { "/" };
        format!("{}/{directory}{separator}{file}", self.url).into()
    }

    pub(super) fn failed(
        &self,
        operation: &'static str,
        directory: &str,
        file: &str,
        error: &Error,
    ) -> CheckpointError {
        CheckpointError::Store {
            operation,
            path: self.path(directory, file),
            detail: one_line(error),
            gone: matches!(error, Error::NotFound { .. }),
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.url)
    }
}

fn gone_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::NotFound { .. }) => Ok(()),
        result => result,
    }
}

/// Answers of servers come as pages of XML.
fn one_line(error: &Error) -> String {
    const LONGEST: usize = 600;
    let words: Vec<String> = error.to_string().split_whitespace().map(str::to_owned).collect();
    words.join(" ").chars().take(LONGEST).collect()
}

/// Says from time to time how far a transfer is: in bytes, as there is no clock here.
pub(super) struct Meter<'a> {
    verb: &'a str,
    path: PathBuf,
    total: u64,
    done: u64,
}

impl<'a> Meter<'a> {
    /// For a transfer of `total` bytes.
    pub(super) fn new(verb: &'a str, path: PathBuf, total: u64) -> Self {
        Self {
            verb,
            path,
            total,
            done: 0,
        }
    }

    /// So many more bytes have gone.
    pub(super) fn add(&mut self, bytes: u64) {
        let before = self.done / NEWS;
        self.done += bytes;
        if self.done / NEWS > before {
            let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
            info!(
                "{} {}: {:.1} of {:.1} GiB",
                self.verb,
                self.path.display(),
                gib(self.done),
                gib(self.total)
            );
        }
    }
}
