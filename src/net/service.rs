//! The greeting of the datagram protocol: a topic's name in, its id and partitions out.
//!
//! Invariant: built once from the configuration and the catalog, then read only.

use crate::wire::datagram::{ErrorCode, Hello, WELCOME_LEN, Welcome};

/// What a producer is told of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedTopic {
    /// Its name.
    pub name: String,
    /// Its id in the catalog.
    pub id: u32,
    /// Its number of partitions.
    pub partitions: u32,
}

/// All topics, by name.
#[derive(Debug, Clone)]
pub struct TopicTable {
    /// In the order of their names.
    topics: Vec<ServedTopic>,
    default_acks: i8,
    credit: u32,
    max_datagram: u32,
}

impl TopicTable {
    /// `default_acks` is for clients that do not choose (0, 1 or −1), `credit` the batches a
    /// producer may have unacknowledged in a partition at the start, `max_datagram` the UDP payload
    /// in bytes that a client may send.
    pub fn new(
        mut topics: Vec<ServedTopic>,
        default_acks: i8,
        credit: u32,
        max_datagram: u32,
    ) -> Self {
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        Self {
            topics,
            default_acks,
            credit,
            max_datagram,
        }
    }

    /// The answer to a greeting; [`ErrorCode::UnknownPartition`] for a topic that does not exist.
    pub fn welcome(&self, hello: &Hello<'_>) -> Welcome {
        let found = self
            .topics
            .binary_search_by(|topic| topic.name.as_str().cmp(hello.topic));
        let (error, topic_id, partitions) = match found {
            Ok(index) => (
                ErrorCode::None,
                self.topics[index].id,
                self.topics[index].partitions,
            ),
            Err(_) => (ErrorCode::UnknownPartition, 0, 0),
        };
        Welcome {
            request_id: hello.request_id,
            error,
            default_acks: self.default_acks,
            topic_id,
            partitions,
            credit: self.credit,
            max_datagram: self.max_datagram,
        }
    }

    /// Writes the UDP payload that answers `hello`; returns its length, `None` without room.
    pub fn answer(&self, hello: &Hello<'_>, out: &mut [u8]) -> Option<usize> {
        Some(self.welcome(hello).encode(out.get_mut(..WELCOME_LEN)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::datagram::Response;

    #[test]
    fn topics_are_found_by_name() {
        let topic = |name: &str, id, partitions| ServedTopic {
            name: name.into(),
            id,
            partitions,
        };
        let table = TopicTable::new(vec![topic("b", 7, 4), topic("a", 9, 1)], -1, 32, 1472);
        let mut out = [0; 64];
        for (name, error, id, partitions) in [
            ("a", ErrorCode::None, 9, 1),
            ("b", ErrorCode::None, 7, 4),
            ("c", ErrorCode::UnknownPartition, 0, 0),
        ] {
            let hello = Hello {
                request_id: 5,
                topic: name,
            };
            let len = table.answer(&hello, &mut out).unwrap();
            let Ok(Response::Welcome(welcome)) = Response::decode(&out[..len]) else {
                panic!("no welcome")
            };
            assert_eq!(
                welcome,
                Welcome {
                    request_id: 5,
                    error,
                    default_acks: -1,
                    topic_id: id,
                    partitions,
                    credit: 32,
                    max_datagram: 1472,
                }
            );
            assert_eq!(table.answer(&hello, &mut out[..WELCOME_LEN - 1]), None);
        }
    }
}
