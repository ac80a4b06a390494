//! Exits that the coordinator may not have heard of. There is no acknowledgement of their own: the stream keeps its
//! order, so the acknowledgement of a heartbeat sent later covers them. After a reconnect the rest is sent again.
//! Pure.

use arcface_proto::v1::RankExited;

/// Exits with the first heartbeat that was sent after them on the current connection.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Vec<(RankExited, Option<u64>)>,
}

impl Outbox {
    /// An exit was sent, or will be by [`Outbox::resend`].
    pub fn push(&mut self, exit: RankExited) {
        self.waiting.retain(|(known, _)| known.rank != exit.rank);
        self.waiting.push((exit, None));
    }

    /// Heartbeat `sequence` was sent.
    pub fn heartbeat_sent(&mut self, sequence: u64) {
        for (_, covered_by) in &mut self.waiting {
            covered_by.get_or_insert(sequence);
        }
    }

    /// Heartbeat `sequence` was acknowledged.
    pub fn acknowledged(&mut self, sequence: u64) {
        self.waiting
            .retain(|(_, covered_by)| covered_by.is_none_or(|covering| covering > sequence));
    }

    /// What a new connection has to carry, oldest first.
    pub fn resend(&mut self) -> Vec<RankExited> {
        for (_, covered_by) in &mut self.waiting {
            *covered_by = None;
        }
        self.waiting.iter().map(|(exit, _)| exit.clone()).collect()
    }

    /// True if the coordinator has heard of everything.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arcface_proto::v1::NodeRank;

    fn exit(rank: u32) -> RankExited {
        RankExited {
            rank: Some(NodeRank {
                rank,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn an_exit_is_kept_until_a_later_heartbeat_is_acknowledged() {
        let mut outbox = Outbox::default();
        outbox.heartbeat_sent(1);
        outbox.push(exit(0));
        outbox.acknowledged(1);
        assert!(!outbox.is_empty(), "heartbeat 1 was sent before the exit");
        outbox.heartbeat_sent(2);
        outbox.push(exit(1));
        outbox.acknowledged(2);
        assert_eq!(outbox.resend(), vec![exit(1)]);
        // On the new connection the numbers start again and the old ones mean nothing.
        outbox.acknowledged(2);
        assert!(!outbox.is_empty());
        outbox.heartbeat_sent(1);
        outbox.acknowledged(1);
        assert!(outbox.is_empty());
    }
}
