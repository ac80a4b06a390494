//! Where the ranks of one generation meet: each brings its endpoint, and when all have come, each gets them all.

use super::ControlError;
use arcface_proto::v1::RendezvousResponse;
use tokio::sync::oneshot;

/// Answers one waiting rank.
pub type Reply = oneshot::Sender<Result<RendezvousResponse, ControlError>>;

/// Longest endpoint: a DNS name is at most 253 characters, a port 5.
const MAX_ENDPOINT_BYTES: usize = 300;
/// NCCL's unique id has 128.
const MAX_NCCL_ID_BYTES: usize = 1024;

/// Where a rank is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// For its peers.
    pub ring: String,
    /// For parts of checkpoints; empty for none.
    pub parts: String,
}

/// The meeting of one generation.
#[derive(Default)]
pub struct Rendezvous {
    came: Vec<Option<Endpoints>>,
    nccl_unique_id: Vec<u8>,
    waiting: Vec<Reply>,
    first_came_ms: Option<u64>,
}

impl Rendezvous {
    /// A new meeting; whoever waits for the old one is told that it is over.
    pub fn open(&mut self, world_size: usize) {
        self.end("the next generation was opened");
        self.came = vec![None; world_size];
    }

    /// Ends the meeting.
    pub fn end(&mut self, reason: &str) {
        for reply in self.waiting.drain(..) {
            // A rank that no longer waits needs no answer.
            let _ = reply.send(Err(ControlError::Aborted(reason.to_owned())));
        }
        self.came.clear();
        self.nccl_unique_id.clear();
        self.first_came_ms = None;
    }

    /// A rank came. True if it was the last. A rank that comes again (its call was cut) gets the same answer.
    pub fn join(
        &mut self,
        rank: u32,
        world_size: usize,
        endpoints: Endpoints,
        nccl_unique_id: Vec<u8>,
        reply: Reply,
        now_ms: u64,
    ) -> bool {
        // Empty after a restart of the coordinator: ranks that were waiting come again.
        self.came.resize(world_size, None);
        let refusal = check(&endpoints, &nccl_unique_id);
        let complete = self.is_complete();
        let Some(slot) = self.came.get_mut(rank as usize) else {
            let _ = reply.send(Err(ControlError::invalid(
                "rank.rank",
                format!("{rank} is not below {world_size}"),
            )));
            return false;
        };
        let moved = complete && slot.as_ref() != Some(&endpoints);
        let refusal = refusal.or_else(|| {
            moved.then(|| {
                ControlError::Refused(format!(
                    "rank {rank} has already met its peers from another endpoint"
                ))
            })
        });
        if let Some(refusal) = refusal {
            let _ = reply.send(Err(refusal));
            return false;
        }
        *slot = Some(endpoints);
        if rank == 0 {
            self.nccl_unique_id = nccl_unique_id;
        }
        self.first_came_ms.get_or_insert(now_ms);
        self.waiting.push(reply);
        if !self.is_complete() {
            return false;
        }
        let response = RendezvousResponse {
            endpoints: self.came.iter().flatten().map(|came| came.ring.clone()).collect(),
            parts_endpoints: self
                .came
                .iter()
                .flatten()
                .map(|came| came.parts.clone())
                .collect(),
            nccl_unique_id: self.nccl_unique_id.clone(),
        };
        for reply in self.waiting.drain(..) {
            let _ = reply.send(Ok(response.clone()));
        }
        !complete
    }

    fn is_complete(&self) -> bool {
        !self.came.is_empty() && self.came.iter().all(Option::is_some)
    }

    /// Tells those who wait longer than `limit_ms` who is missing.
    pub fn tick(&mut self, now_ms: u64, limit_ms: u64) {
        let waited_ms = self.first_came_ms.map_or(0, |since| now_ms.saturating_sub(since));
        if self.waiting.is_empty() || waited_ms < limit_ms {
            return;
        }
        let missing: Vec<String> = self
            .came
            .iter()
            .enumerate()
            .filter(|(_, endpoint)| endpoint.is_none())
            .map(|(rank, _)| rank.to_string())
            .collect();
        let reason = format!(
            "after {:.1} s these ranks have not come: {}",
            waited_ms as f64 / 1e3,
            missing.join(", ")
        );
        for reply in self.waiting.drain(..) {
            let _ = reply.send(Err(ControlError::Deadline(reason.clone())));
        }
        self.came.iter_mut().for_each(|came| *came = None);
        self.first_came_ms = None;
    }
}

fn check(endpoints: &Endpoints, nccl_unique_id: &[u8]) -> Option<ControlError> {
    let parts = Some(&endpoints.parts).filter(|parts| !parts.is_empty());
    let named = [("endpoint", Some(&endpoints.ring)), ("parts_endpoint", parts)];
    for (name, endpoint) in named
        .into_iter()
        .filter_map(|(name, endpoint)| Some((name, endpoint?)))
    {
        let port = endpoint
            .rsplit_once(':')
            .map(|(host, port)| (!host.is_empty(), port.parse::<u16>()));
        if endpoint.len() > MAX_ENDPOINT_BYTES || !matches!(port, Some((true, Ok(1..)))) {
            let shown: String = endpoint.chars().take(64).collect();
            return Some(ControlError::invalid(name, format!("{shown:?} is not HOST:PORT")));
        }
    }
    (nccl_unique_id.len() > MAX_NCCL_ID_BYTES).then(|| {
        ControlError::invalid(
            "nccl_unique_id",
            format!("{} bytes are too many", nccl_unique_id.len()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(
        meeting: &mut Rendezvous,
        rank: u32,
        endpoint: &str,
    ) -> oneshot::Receiver<Result<RendezvousResponse, ControlError>> {
        let (reply, answer) = oneshot::channel();
        let endpoints = Endpoints {
            ring: endpoint.into(),
            parts: if rank == 0 { endpoint.into() } else { String::new() },
        };
        meeting.join(rank, 2, endpoints, vec![rank as u8], reply, 0);
        answer
    }

    #[test]
    fn all_get_all_endpoints_and_rank_0s_id() {
        let mut meeting = Rendezvous::default();
        meeting.open(2);
        let mut one = call(&mut meeting, 1, "b:2");
        assert!(one.try_recv().is_err(), "waits for rank 0");
        let mut zero = call(&mut meeting, 0, "a:1");
        for answer in [&mut zero, &mut one] {
            let response = answer.try_recv().expect("answered").expect("met");
            assert_eq!(response.endpoints, ["a:1", "b:2"]);
            assert_eq!(response.parts_endpoints, ["a:1", ""]);
            assert_eq!(response.nccl_unique_id, [0]);
        }
        let mut again = call(&mut meeting, 1, "b:2");
        assert!(
            again.try_recv().expect("answered").is_ok(),
            "a repeated call gets the same answer"
        );
        let mut stranger = call(&mut meeting, 1, "c:3");
        assert!(matches!(
            stranger.try_recv().expect("answered"),
            Err(ControlError::Refused(_))
        ));
    }

    #[test]
    fn those_who_wait_learn_that_it_is_over_or_who_is_missing() {
        let mut meeting = Rendezvous::default();
        meeting.open(2);
        let mut zero = call(&mut meeting, 0, "a:1");
        meeting.tick(999, 1000);
        assert!(zero.try_recv().is_err());
        meeting.tick(1000, 1000);
        let Err(ControlError::Deadline(why)) = zero.try_recv().expect("answered") else {
            panic!("a deadline")
        };
        assert_eq!(why, "after 1.0 s these ranks have not come: 1");
        let mut zero = call(&mut meeting, 0, "a:1");
        meeting.end("rank 1 died");
        assert!(matches!(
            zero.try_recv().expect("answered"),
            Err(ControlError::Aborted(_))
        ));
    }

    #[test]
    fn endpoints_are_checked() {
        for endpoint in [
            "",
            "a",
            ":1",
            "a:",
            "a:0",
            "a:65536",
            "a:b",
            &format!("{}:1", "a".repeat(400)),
        ] {
            let mut meeting = Rendezvous::default();
            let mut answer = call(&mut meeting, 0, endpoint);
            assert!(
                matches!(
                    answer.try_recv().expect("answered"),
                    Err(ControlError::Invalid { .. })
                ),
                "{endpoint:?}"
            );
        }
    }
}
