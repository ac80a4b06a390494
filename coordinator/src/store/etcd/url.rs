//! Where the state is in etcd, as people write it: `http://a:2379,http://b:2379/prefix`. Pure.

use std::{fmt, str::FromStr};

/// Prefix of all keys if none is given.
const DEFAULT_PREFIX: &str = "/arcface/";
/// Longest prefix in bytes.
const MAX_PREFIX_BYTES: usize = 200;

/// Members of an etcd cluster and a prefix of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdUrl {
    endpoints: Vec<String>,
    /// Begins and ends with a slash.
    prefix: String,
}

impl EtcdUrl {
    /// `http://HOST:PORT` of every member, or `https://HOST:PORT` of every one.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// Whether the members speak TLS.
    pub fn is_encrypted(&self) -> bool {
        self.endpoints.iter().any(|url| url.starts_with("https:"))
    }

    pub(super) fn leader_key(&self) -> String {
        format!("{}leader", self.prefix)
    }

    pub(super) fn format_key(&self) -> String {
        format!("{}format", self.prefix)
    }

    pub(super) fn state_key(&self, key: &str) -> String {
        format!("{}state/{key}", self.prefix)
    }

    /// The reverse of [`Self::state_key`].
    pub(super) fn key_of<'a>(&self, state_key: &'a str) -> Option<&'a str> {
        state_key
            .strip_prefix(self.prefix.as_str())?
            .strip_prefix("state/")
    }
}

impl FromStr for EtcdUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut endpoints = Vec::new();
        let mut prefix = DEFAULT_PREFIX.to_owned();
        let last = text.split(',').count() - 1;
        for (index, url) in text.split(',').map(str::trim).enumerate() {
            let not_an_address = || format!("etcd member {url:?} is not http[s]://HOST:PORT");
            let (scheme, address) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
                (Some(address), _) => ("http", address),
                (_, Some(address)) => ("https", address),
                (None, None) => return Err(not_an_address()),
            };
            let (address, path) = address.split_once('/').unwrap_or((address, ""));
            let is_address = address.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty()
                    && !host.contains([' ', '@', '?', '#'])
                    && port.parse::<u16>().is_ok_and(|port| port > 0)
            });
            if !is_address {
                return Err(not_an_address());
            }
            let path = path.trim_matches('/');
            if !path.is_empty() && index != last {
                return Err(format!(
                    "etcd member {url:?}: the prefix {path:?} belongs after the last member"
                ));
            }
            if !path.is_empty() {
                prefix = format!("/{path}/");
            }
            endpoints.push(format!("{scheme}://{address}"));
        }
        let encrypted = endpoints.iter().filter(|url| url.starts_with("https:")).count();
        if encrypted > 0 && encrypted < endpoints.len() {
            return Err("some members of etcd are http, others https".into());
        }
        let plain = prefix.len() <= MAX_PREFIX_BYTES
            && prefix
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.'));
        match plain {
            true => Ok(Self { endpoints, prefix }),
            false => Err(format!(
                "etcd prefix {prefix:?} is not at most {MAX_PREFIX_BYTES} letters, digits and -_./"
            )),
        }
    }
}

impl fmt::Display for EtcdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}{}",
            self.endpoints.join(","),
            self.prefix.trim_end_matches('/')
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_prefix_are_read() {
        let url: EtcdUrl = "http://a:2379,http://b:2379".parse().expect("valid");
        assert_eq!(url.endpoints(), ["http://a:2379", "http://b:2379"]);
        assert_eq!(url.leader_key(), "/arcface/leader");
        assert_eq!(url.key_of(&url.state_key("job/x")), Some("job/x"));
        assert_eq!(url.to_string(), "http://a:2379,http://b:2379/arcface");
        let url: EtcdUrl = "http://[::1]:2379/teams/faces/".parse().expect("valid");
        assert_eq!(url.leader_key(), "/teams/faces/leader");
        assert_eq!(url.to_string().parse(), Ok(url));
        let url: EtcdUrl = "https://a:2379,https://b:2379".parse().expect("valid");
        assert!(url.is_encrypted());
        assert_eq!(url.to_string(), "https://a:2379,https://b:2379/arcface");
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for text in [
            "",
            "a:2379",
            "http://a",
            "http://:1",
            "http://a:0",
            "http://a:1,",
            "http://a:1/x,http://b:1",
            "http://a:1/ä",
            "http://u@a:1",
            "http://a:1,https://b:1",
        ] {
            assert!(text.parse::<EtcdUrl>().is_err(), "{text:?}");
        }
    }
}
