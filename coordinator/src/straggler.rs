//! Pure: which ranks of a world hold up the others. Training is synchronous, so that every rank's steps take as long as the
//! slowest rank's; what tells them apart is the time that each spends by itself. Knows no clock and acts on nobody: a
//! straggler is named, never ended.
//!
//! Ranks are compared in rounds: one is over when every rank has reported since the last. A rank is found slow in several
//! rounds in a row, or it is not; and it must be clearly no slower, several times, to be forgotten.
//!
//! Only what a rank does by itself can be told. A slow link is none of it: the ranks pass their sums around in a ring, and
//! every one of them waits as long.

use std::fmt;

/// A rank is slow if its own time is over this multiple of the median of the others.
const SLOW: f64 = 1.5;
/// It also must be over it by at least so many seconds a step: of a step of a few milliseconds, noise is half.
const SLOW_BY_S: f64 = 0.010;
/// One that was found is clearly no slower below this multiple, or by less than half of those seconds.
const WELL: f64 = 1.25;
/// Rounds in a row that it takes, either way.
const ROUNDS: u32 = 3;
/// Own times below it are as good as none: no ratio is larger than what this gives.
const SHORTEST_S: f64 = 0.001;

/// Seconds that a rank spent by itself, a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    /// Waiting for data.
    pub input_s: f64,
    /// Everything else, outside collective operations.
    pub compute_s: f64,
}

impl Pace {
    fn total_s(self) -> f64 {
        self.input_s + self.compute_s
    }
}

/// Where most of the time goes by which a rank is slower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It waits for its data.
    Input,
    /// Its processor or memory is slow or busy.
    Compute,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Compute => "compute",
        })
    }
}

/// A rank that holds up the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Straggler {
    /// The rank.
    pub rank: u32,
    /// What it is slower at.
    pub cause: Cause,
    /// Its own time over the median of the others', as of the last round.
    pub ratio: f64,
}

/// What a round changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum News {
    /// A rank was found.
    Found(Straggler),
    /// One that had been found keeps up again.
    Over(Straggler),
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Reported in this round.
    pace: Option<Pace>,
    /// Rounds in a row that speak for a change.
    streak: u32,
    found: Option<Straggler>,
}

/// The ranks of one generation.
#[derive(Clone, Debug, Default)]
pub struct Paces {
    ranks: Vec<State>,
}

impl Paces {
    /// Those that hold up the others now, by rank.
    pub fn stragglers(&self) -> impl Iterator<Item = Straggler> {
        self.ranks.iter().filter_map(|state| state.found)
    }

    /// A rank of a world of `world_size` reported. Of several reports in a round the last counts.
    pub fn report(&mut self, rank: u32, world_size: usize, pace: Pace) -> Vec<News> {
        self.ranks.resize(world_size, State::default());
        if let Some(state) = self.ranks.get_mut(rank as usize) {
            state.pace = Some(pace);
        }
        let paces: Option<Vec<Pace>> = self.ranks.iter().map(|state| state.pace).collect();
        match paces {
            Some(paces) if paces.len() > 1 => self.judge(&paces),
            _ => Vec::new(),
        }
    }

    /// The end of a round.
    fn judge(&mut self, paces: &[Pace]) -> Vec<News> {
        let mut news = Vec::new();
        for (rank, state) in self.ranks.iter_mut().enumerate() {
            state.pace = None;
            let others = |of: fn(Pace) -> f64| {
                let others = paces.iter().enumerate().filter(|(other, _)| *other != rank);
                median(others.map(|(_, pace)| of(*pace)).collect())
            };
            let (own_s, usual_s) = (paces[rank].total_s(), others(Pace::total_s));
            let excess_s = own_s - usual_s;
            let slow = own_s > SLOW * usual_s && excess_s >= SLOW_BY_S;
            let well = own_s < WELL * usual_s || excess_s < SLOW_BY_S / 2.0;
            let input_s = paces[rank].input_s - others(|pace| pace.input_s);
            let compute_s = paces[rank].compute_s - others(|pace| pace.compute_s);
            let seen = Straggler {
                rank: rank as u32,
                cause: if input_s > compute_s {
                    Cause::Input
                } else {
                    Cause::Compute
                },
                ratio: own_s.max(SHORTEST_S) / usual_s.max(SHORTEST_S),
            };
            let changes = if state.found.is_some() { well } else { slow };
            state.streak = if changes { state.streak + 1 } else { 0 };
            if let Some(found) = &mut state.found {
                *found = seen;
            }
            if state.streak == ROUNDS {
                state.streak = 0;
                match state.found.take() {
                    Some(_) => news.push(News::Over(seen)),
                    None => {
                        state.found = Some(seen);
                        news.push(News::Found(seen));
                    }
                }
            }
        }
        news
    }
}

/// The middle value, or the mean of the two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() % 2 {
        _ if values.is_empty() => 0.0,
        0 => (values[half - 1] + values[half]) / 2.0,
        _ => values[half],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables;
    use proptest::prelude::*;

    /// A line a round, a word a rank: `INPUT+COMPUTE` in ms, or `-` for one that does not report. `xN` at the end repeats it.
    fn case(lines: &[&str]) -> String {
        let mut paces = Paces::default();
        let mut output = Vec::new();
        for line in lines {
            let mut words: Vec<&str> = line.split_whitespace().collect();
            let times = words.last().and_then(|word| word.strip_prefix('x')?.parse().ok());
            if times.is_some() {
                words.pop();
            }
            for _ in 0..times.unwrap_or(1) {
                for (rank, word) in words.iter().enumerate() {
                    let Some((input, compute)) = word.split_once('+') else {
                        continue;
                    };
                    let seconds = |text: &str| text.parse::<f64>().expect("ms") / 1000.0;
                    let pace = Pace {
                        input_s: seconds(input),
                        compute_s: seconds(compute),
                    };
                    output.extend(
                        paces
                            .report(rank as u32, words.len(), pace)
                            .into_iter()
                            .map(|news| match news {
                                News::Found(s) => {
                                    format!("{line}: rank {} x {:.2}, {}", s.rank, s.ratio, s.cause)
                                }
                                News::Over(s) => format!("{line}: rank {} keeps up", s.rank),
                            }),
                    );
                }
            }
        }
        let now: Vec<String> = paces
            .stragglers()
            .map(|s| format!("rank {} x {:.2}", s.rank, s.ratio))
            .collect();
        output.push(format!(
            "now: {}",
            if now.is_empty() {
                "nobody".into()
            } else {
                now.join(", ")
            }
        ));
        output.join("\n")
    }

    #[test]
    fn table() {
        tables::run("straggler/rounds.txt", case);
    }

    /// Own times of ranks that are equal but for noise of up to 15 %.
    fn equal_ranks() -> impl Strategy<Value = Vec<Vec<Pace>>> {
        (2usize..9, 0.0001f64..3.0, 0.0f64..0.5).prop_flat_map(|(ranks, step_s, input)| {
            let pace = (0.85f64..1.15).prop_map(move |noise| Pace {
                input_s: step_s * input * noise,
                compute_s: step_s * (1.0 - input) * noise,
            });
            prop::collection::vec(prop::collection::vec(pace, ranks), 1..40)
        })
    }

    fn told(paces: &mut Paces, round: &[Pace]) -> Vec<News> {
        let ranks = round.iter().enumerate();
        ranks
            .flat_map(|(rank, pace)| paces.report(rank as u32, round.len(), *pace))
            .collect()
    }

    proptest! {
        #[test]
        fn equal_ranks_are_never_named(rounds in equal_ranks()) {
            let mut paces = Paces::default();
            for round in rounds {
                prop_assert_eq!(told(&mut paces, &round), []);
            }
        }

        /// One rank at less than half the speed of the others is named after three rounds, alone, with its cause; and is
        /// forgotten three rounds after it is as fast as they are.
        #[test]
        fn a_slow_rank_is_named_in_the_third_round(
            rounds in equal_ranks(), slow in 0usize..8, factor in 2.5f64..20.0, starved in any::<bool>(),
        ) {
            let mut paces = Paces::default();
            let fair = &rounds[0];
            prop_assume!(fair[0].total_s() > 0.02);
            let slow = slow % fair.len();
            let mut hindered = fair.clone();
            let usual_s = hindered[slow].total_s();
            match starved {
                true => hindered[slow].input_s += usual_s * (factor - 1.0),
                false => hindered[slow].compute_s += usual_s * (factor - 1.0),
            }
            prop_assert_eq!(told(&mut paces, &hindered), []);
            prop_assert_eq!(told(&mut paces, &hindered), []);
            let named = told(&mut paces, &hindered);
            let cause = if starved { Cause::Input } else { Cause::Compute };
            prop_assert!(
                matches!(named[..], [News::Found(s)] if s.rank == slow as u32 && s.cause == cause && s.ratio > SLOW),
                "{named:?}"
            );
            // As fast as the median of the others, to the letter.
            let even: Vec<Pace> = vec![fair[0]; fair.len()];
            prop_assert_eq!(told(&mut paces, &even), []);
            prop_assert_eq!(told(&mut paces, &even), []);
            let over = told(&mut paces, &even);
            prop_assert!(matches!(over[..], [News::Over(s)] if s.rank == slow as u32), "{over:?}");
            prop_assert_eq!(paces.stragglers().count(), 0);
        }
    }
}
