//! `taffrail group`: consumer groups of the running server are listed, described, set to other offsets and deleted.

use std::collections::BTreeMap;
use std::io::Write;

use clap::error::ErrorKind;
use clap::{CommandFactory, Subcommand};
use serde_json::json;

use super::read::{parse_from, parse_time};
use super::table::print;
use super::{CliResult, ServerArgs};
use crate::control::client::ControlClient;
use crate::control::names;
use crate::control::protocol::{GroupInfo, Position, TopicInfo};

/// Offsets that are committed in one request; more take several.
const COMMIT: usize = 1000;

/// List, describe, reset and delete consumer groups of the running server
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the groups and their states
    List {
        /// Print an array of objects
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Show a group's members, committed offsets and lag
    Describe {
        /// Its name
        group: String,
        /// Print an object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Set a group's committed offsets; it must have no members
    Reset(Reset),
    /// Delete groups with their committed offsets; they must have no members
    Delete {
        /// Their names
        #[arg(required = true)]
        groups: Vec<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
}

#[derive(Debug, clap::Args)]
struct Reset {
    /// The group; one that is not there is made
    group: String,
    /// Where to: earliest, latest, "offset N", "time T" (RFC 3339 or Unix milliseconds), "shift N" (messages on, or back
    /// where N is negative); what is outside of what there is becomes its nearer end
    #[arg(long, num_args = 1..=2, value_names = ["WHERE", "N"], required = true, allow_negative_numbers = true)]
    to: Vec<String>,
    /// Only this topic, or only these of its partitions (orders:0,2); may be given several times [default: all
    /// partitions that the group has offsets of]
    #[arg(long, value_name = "TOPIC[:P]")]
    topic: Vec<String>,
    /// Only print what would be set
    #[arg(long)]
    dry_run: bool,
    /// Print an array of objects
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Where offsets are set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    Position(Position),
    Shift(i64),
}

fn parse_to(words: &[String]) -> Result<To, String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |text: &str| {
        let number = text.parse::<i64>();
        number.map_err(|_| format!("\"{text}\" is no number"))
    };
    Ok(match words[..] {
        [word @ ("earliest" | "latest")] => To::Position(parse_from(word)?),
        ["offset", n] => To::Position(Position::Offset(number(n)?)),
        ["time", time] => To::Position(parse_time(time)?),
        ["shift", n] => To::Shift(number(n)?),
        _ => {
            return Err(format!(
                "\"{}\" is not one of earliest, latest, offset N, time T, shift N",
                words.join(" ")
            ));
        }
    })
}

type Error = Box<dyn std::error::Error + Send + Sync>;

fn connect(server: &ServerArgs) -> Result<ControlClient, Error> {
    Ok(ControlClient::connect(&server.socket_path()?)?)
}

/// The group, or which ones there are.
fn find(client: &mut ControlClient, group: &str) -> Result<GroupInfo, Error> {
    let info = client.group(group)?;
    if info.state == DEAD {
        let groups = client.groups()?;
        let names = groups.iter().map(|g| g.group.as_str());
        return Err(names::unknown("group", group, names, "taffrail group list").into());
    }
    Ok(info)
}

/// Kafka's word for a group that is not there, and for one without members.
const DEAD: &str = "Dead";
const EMPTY: &str = "Empty";

/// Does what the subcommand says.
pub fn run(args: &Args) -> CliResult {
    match &args.command {
        Command::List { json, server } => {
            let groups = connect(server)?.groups()?;
            let mut out = std::io::stdout().lock();
            if *json {
                writeln!(out, "{}", json!(groups))?;
                return Ok(());
            }
            let rows = groups
                .into_iter()
                .map(|group| vec![group.group, group.state, group.protocol_type]);
            print(&mut out, &["group", "state", "type"], 3, rows)
        }
        Command::Describe {
            group,
            json,
            server,
        } => describe(&find(&mut connect(server)?, group)?, *json),
        Command::Reset(args) => reset(args),
        Command::Delete { groups, server } => {
            let mut client = connect(server)?;
            for group in groups {
                find(&mut client, group)?;
            }
            for group in groups {
                client.delete_group(group)?;
                eprintln!("deleted group {group}");
            }
            Ok(())
        }
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn describe(info: &GroupInfo, json: bool) -> CliResult {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", json!(info))?;
        return Ok(());
    }
    let kind = match (&*info.protocol_type, &*info.assignor) {
        ("", _) => "offsets only".to_owned(),
        (kind, "") => kind.to_owned(),
        (kind, assignor) => format!("{kind}, {assignor}"),
    };
    let (members, partitions) = (&info.members, &info.partitions);
    let lag: i64 = partitions.iter().filter_map(|p| p.lag).sum();
    writeln!(
        out,
        "group {}: {}, {kind}; {} members, {} partitions, lag {lag}",
        info.group,
        info.state,
        members.len(),
        partitions.len()
    )?;
    if !members.is_empty() {
        writeln!(out)?;
        let rows = members.iter().map(|member| {
            let topics = member.assignment.iter().map(|(topic, partitions)| {
                let list: Vec<String> = partitions.iter().map(u32::to_string).collect();
                format!("{topic}:{}", list.join(","))
            });
            vec![
                member.member.clone(),
                or_dash(member.instance.as_ref()),
                member.client_id.clone(),
                member.host.clone(),
                topics.collect::<Vec<_>>().join(" "),
            ]
        });
        let head = ["member", "instance", "client", "host", "partitions"];
        print(&mut out, &head, 5, rows)?;
    }
    if !partitions.is_empty() {
        writeln!(out)?;
        let rows = partitions.iter().map(|p| {
            let client = members
                .iter()
                .find(|member| Some(&member.member) == p.member.as_ref());
            vec![
                p.topic.clone(),
                p.partition.to_string(),
                or_dash(p.committed),
                or_dash(p.start),
                or_dash(p.end),
                or_dash(p.lag),
                or_dash(client.map(|member| &member.client_id)),
            ]
        });
        let head = [
            "topic",
            "partition",
            "committed",
            "start",
            "end",
            "lag",
            "client",
        ];
        print(&mut out, &head, 1, rows)?;
    }
    Ok(())
}

/// The partitions that `--topic` names, by topic; without it those that the group has offsets of.
fn chosen(
    args: &Reset,
    info: &GroupInfo,
    topics: &[TopicInfo],
) -> Result<BTreeMap<String, Vec<u32>>, String> {
    let mut chosen: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for text in &args.topic {
        let find = |name: &str| topics.iter().find(|topic| topic.name == name);
        // Names of topics have no colon.
        let (name, list) = match text.split_once(':') {
            Some((name, list)) => (name, Some(list)),
            None => (text.as_str(), None),
        };
        let names = topics.iter().map(|t| t.name.as_str());
        let topic = find(name).ok_or_else(|| names::unknown_topic(name, names))?;
        let count = topic.partitions.len() as u32;
        let partitions = chosen.entry(name.to_owned()).or_default();
        match list {
            None => partitions.extend(0..count),
            Some(list) => {
                for number in list.split(',') {
                    match number.trim().parse() {
                        Ok(partition) if partition < count => partitions.push(partition),
                        _ => {
                            let last = count - 1;
                            return Err(format!(
                                "topic {name} has partitions 0 to {last}, not \"{number}\""
                            ));
                        }
                    }
                }
            }
        }
        partitions.sort_unstable();
        partitions.dedup();
    }
    if args.topic.is_empty() {
        // Those whose topic is gone are nothing to go back to.
        for partition in info.partitions.iter().filter(|p| p.end.is_some()) {
            let list = chosen.entry(partition.topic.clone()).or_default();
            list.push(partition.partition);
        }
        if chosen.is_empty() {
            let group = &info.group;
            return Err(format!(
                "group {group} has no committed offsets: say which --topic"
            ));
        }
    }
    Ok(chosen)
}

fn reset(args: &Reset) -> CliResult {
    let to = match parse_to(&args.to) {
        Ok(to) => to,
        Err(reason) => super::Cli::command()
            .error(ErrorKind::ValueValidation, format!("--to: {reason}"))
            .exit(),
    };
    let mut client = connect(&args.server)?;
    let group = &args.group;
    let info = match args.topic.is_empty() {
        true => find(&mut client, group)?,
        false => client.group(group)?,
    };
    if info.state != EMPTY && info.state != DEAD {
        return Err(format!(
            "group {group} is {}, with {} members: offsets are reset when they have stopped; `taffrail group describe {group}` names them",
            info.state,
            info.members.len()
        )
        .into());
    }
    let topics = client.topics()?;
    let mut changes = Vec::new();
    for (topic, partitions) in chosen(args, &info, &topics)? {
        for partition in partitions {
            let known = info.partitions.iter();
            let before = known
                .filter(|p| p.topic == topic && p.partition == partition)
                .find_map(|p| p.committed);
            let position = match (to, before) {
                (To::Position(position), _) => position,
                (To::Shift(by), Some(before)) => Position::Offset(before.saturating_add(by)),
                (To::Shift(_), None) => {
                    return Err(format!(
                        "group {group} has no committed offset of {topic} {partition} to shift"
                    )
                    .into());
                }
            };
            let found = client.find(&topic, partition, position)?;
            let after = found.from.clamp(found.start, found.high_watermark);
            changes.push((
                topic.clone(),
                partition,
                before,
                after,
                found.high_watermark,
            ));
        }
    }
    if !args.dry_run {
        for part in changes.chunks(COMMIT) {
            let mut offsets: BTreeMap<String, BTreeMap<u32, i64>> = BTreeMap::new();
            for (topic, partition, _, after, _) in part {
                let list = offsets.entry(topic.clone()).or_default();
                list.insert(*partition, *after);
            }
            client.commit(group, offsets)?;
        }
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        let object =
            |(topic, partition, before, after, end): &(String, u32, Option<i64>, i64, i64)| {
                json!({
                    "topic": topic, "partition": partition, "before": before, "committed": after,
                    "lag": end - after,
                })
            };
        let list: Vec<serde_json::Value> = changes.iter().map(object).collect();
        writeln!(out, "{}", serde_json::Value::from(list))?;
    } else {
        let rows = changes
            .iter()
            .map(|(topic, partition, before, after, end)| {
                vec![
                    topic.clone(),
                    partition.to_string(),
                    or_dash(*before),
                    after.to_string(),
                    (end - after).to_string(),
                ]
            });
        let head = ["topic", "partition", "before", "committed", "lag"];
        print(&mut out, &head, 1, rows)?;
    }
    match args.dry_run {
        true => eprintln!("nothing was set: --dry-run"),
        false => eprintln!("set {} offsets of group {group}", changes.len()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_understood() {
        let to = |text: &str| {
            let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
            parse_to(&words)
        };
        assert_eq!(to("earliest"), Ok(To::Position(Position::Earliest)));
        assert_eq!(to("offset 7"), Ok(To::Position(Position::Offset(7))));
        assert_eq!(
            to("time 1970-01-01T00:00:01Z"),
            Ok(To::Position(Position::Time(1000)))
        );
        assert_eq!(to("shift -5"), Ok(To::Shift(-5)));
        for wrong in ["", "offset", "earliest g", "shift x", "time soon", "7"] {
            assert!(to(wrong).is_err(), "{wrong}");
        }
    }
}
