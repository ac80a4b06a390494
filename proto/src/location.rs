//! Where a job's checkpoints go, if not to its output directory: a URL without secrets. Endpoint and credentials of an
//! object store are none of a job's business: they are in the environment of the workers.

use std::fmt;

/// What keeps the checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// A directory.
    File,
    /// Amazon S3, or a server that speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
}

impl Scheme {
    const ALL: [(&str, Self); 4] = [
        ("file", Self::File),
        ("s3", Self::S3),
        ("gs", Self::Gs),
        ("az", Self::Az),
    ];

    /// As it stands before `://`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
        }
    }
}

/// A location, valid by construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUrl {
    scheme: Scheme,
    container: String,
    path: String,
}

impl StoreUrl {
    /// What keeps the checkpoints.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Bucket or container; empty for a directory.
    pub fn container(&self) -> &str {
        &self.container
    }

    /// Of a directory the absolute path; else the prefix of all names, without `/` at its ends, perhaps empty.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it, and what to do about it.
    pub fn parse(text: &str) -> Result<Self, (String, &'static str)> {
        const FORMS: &str = "file:///DIR, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX";
        const SECRETS: &str = "endpoint and credentials belong in the environment of the workers (docs/checkpoints.md): a job \
                               file is no place for secrets";
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err((format!("{text:?} is no URL"), FORMS));
        };
        let known = Scheme::ALL.iter().find(|(name, _)| *name == scheme);
        let Some((_, scheme)) = known.copied() else {
            let names = Scheme::ALL.map(|(name, _)| name);
            let problem = format!("scheme {scheme:?} is not one of {}", names.join(", "));
            return Err((problem, FORMS));
        };
        // The text may hold a secret then: it is not repeated.
        if rest.contains(['?', '#']) {
            return Err(("has a query or a fragment".into(), SECRETS));
        }
        let (container, path) = rest.split_once('/').unwrap_or((rest, ""));
        if container.contains('@') {
            return Err(("has user information before the \"@\"".into(), SECRETS));
        }
        let path = path.trim_end_matches('/');
        let refused = |c: char| match scheme {
            Scheme::File => c == '%' || c.is_control(),
            // What every store takes as it is.
            _ => !c.is_ascii_alphanumeric() && !"-_.=+,@".contains(c),
        };
        if path
            .split('/')
            .any(|part| matches!(part, "." | "..") || part.contains(refused))
            || !path.is_empty() && path.split('/').any(str::is_empty)
        {
            let problem = format!(
                "path {path:?} has a part that is empty, \".\", \"..\" or has a character that is not taken"
            );
            return Err((
                problem,
                "letters, digits and any of \"-_.=+,@\" do; nothing is percent-encoded",
            ));
        }
        if scheme == Scheme::File {
            return match (container, path) {
                ("", path) if !path.is_empty() => Ok(Self {
                    scheme,
                    container: String::new(),
                    path: format!("/{path}"),
                }),
                _ => Err((
                    format!("{text:?} names no absolute directory"),
                    "file:///DIR, with three slashes",
                )),
            };
        }
        let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if container.is_empty() || !container.chars().all(valid) {
            return Err((
                format!("{container:?} is no name of a bucket or container"),
                "letters, digits and any of \"-_.\"; an endpoint belongs in the environment of the workers (AWS_ENDPOINT_URL)",
            ));
        }
        Ok(Self {
            scheme,
            container: container.into(),
            path: path.into(),
        })
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            scheme,
            container,
            path,
        } = self;
        let between = match (scheme, path.as_str()) {
            (Scheme::File, _) | (_, "") => "",
            _ => "/",
        };
        write!(f, "{}://{container}{between}{path}", scheme.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_and_put_together() {
        let cases = [
            (
                "file:///srv/ckpt/",
                Scheme::File,
                "",
                "/srv/ckpt",
                "file:///srv/ckpt",
            ),
            ("file:///a dir/ü", Scheme::File, "", "/a dir/ü", "file:///a dir/ü"),
            ("s3://faces", Scheme::S3, "faces", "", "s3://faces"),
            ("s3://faces/", Scheme::S3, "faces", "", "s3://faces"),
            (
                "s3://fa.ces-1/r50/a=b/",
                Scheme::S3,
                "fa.ces-1",
                "r50/a=b",
                "s3://fa.ces-1/r50/a=b",
            ),
            ("gs://b/x", Scheme::Gs, "b", "x", "gs://b/x"),
            ("az://c/x/y", Scheme::Az, "c", "x/y", "az://c/x/y"),
        ];
        for (text, scheme, container, path, shown) in cases {
            let url = StoreUrl::parse(text).expect(text);
            assert_eq!(
                (url.scheme(), url.container(), url.path()),
                (scheme, container, path)
            );
            assert_eq!(url.to_string(), shown);
            assert_eq!(StoreUrl::parse(shown), Ok(url));
        }
    }

    #[test]
    fn what_is_no_location_is_refused_with_its_reason() {
        let cases = [
            ("", "is no URL"),
            ("/srv/ckpt", "is no URL"),
            ("s4://b/x", "scheme \"s4\" is not one of file, s3, gs, az"),
            ("https://s3.example.org/b", "is not one of file, s3, gs, az"),
            ("gcs://b/x", "scheme \"gcs\" is not one of file, s3, gs, az"),
            ("s3://", "is no name of a bucket"),
            ("s3:///x", "is no name of a bucket"),
            ("s3://b:9000/x", "is no name of a bucket"),
            ("s3://b/x/../y", "has a part that is"),
            ("s3://b//x", "has a part that is"),
            ("s3://b/a b", "has a part that is"),
            ("s3://b/a%2e%2e", "has a part that is"),
            ("file://host/x", "names no absolute directory"),
            ("file:///", "names no absolute directory"),
            ("file:///a/../b", "has a part that is"),
        ];
        for (text, reason) in cases {
            let (problem, hint) = StoreUrl::parse(text).expect_err(text);
            assert!(
                problem.contains(reason) && !hint.is_empty(),
                "{text:?}: {problem}"
            );
        }
    }

    #[test]
    fn secrets_are_refused_and_not_repeated() {
        for text in [
            "s3://key:SECRET@b/x",
            "az://c/x?sig=SECRET",
            "s3://b/x#SECRET",
            "s3://SECRET@b",
        ] {
            let (problem, hint) = StoreUrl::parse(text).expect_err(text);
            assert!(
                !problem.contains("SECRET") && hint.contains("environment"),
                "{text:?}: {problem}"
            );
        }
    }
}
