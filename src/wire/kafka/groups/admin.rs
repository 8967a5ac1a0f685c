//! Messages that find, list, describe and delete groups.

use std::borrow::Cow;

use crate::wire::kafka::{Code, message};

message! {

    /// Asks for the broker that coordinates groups (key type 0) or transactions (1).
    pub struct FindCoordinatorRequest<'a> {
        key: Cow<'a, str> [0..=3],
        key_type: i8 [1..],
        coordinator_keys: Vec<Cow<'a, str>> [4..],
    }

    /// The broker.
    pub struct FindCoordinatorResponse<'a> {
        throttle_time_ms: i32 [1..],
        error_code: Code [0..=3],
        error_message: Option<Cow<'a, str>> [1..=3; Some("".into())],
        node_id: i32 [0..=3],
        host: Cow<'a, str> [0..=3],
        port: i32 [0..=3],
        coordinators: Vec<FoundCoordinator<'a>> [4..],
    }

    /// The broker for one key.
    pub struct FoundCoordinator<'a> {
        key: Cow<'a, str>,
        node_id: i32,
        host: Cow<'a, str>,
        port: i32,
        error_code: Code,
        error_message: Option<Cow<'a, str>>,
    }
    /// Asks for groups with their members.
    pub struct DescribeGroupsRequest<'a> {
        groups: Vec<Cow<'a, str>>,
        include_authorized_operations: bool [3..],
    }

    /// The groups.
    pub struct DescribeGroupsResponse<'a> {
        throttle_time_ms: i32 [1..],
        groups: Vec<DescribedGroup<'a>>,
    }

    /// A group; authorized operations are bits, or the least integer where they were not asked for.
    pub struct DescribedGroup<'a> {
        error_code: Code,
        group_id: Cow<'a, str>,
        group_state: Cow<'a, str>,
        protocol_type: Cow<'a, str>,
        protocol_data: Cow<'a, str>,
        members: Vec<DescribedMember<'a>>,
        authorized_operations: i32 [3..; i32::MIN],
    }

    /// A member.
    pub struct DescribedMember<'a> {
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>> [4..],
        client_id: Cow<'a, str>,
        client_host: Cow<'a, str>,
        member_metadata: Cow<'a, [u8]>,
        member_assignment: Cow<'a, [u8]>,
    }

    /// Asks for all groups, or those in given states.
    pub struct ListGroupsRequest<'a> {
        states_filter: Vec<Cow<'a, str>> [4..],
    }

    /// The groups.
    pub struct ListGroupsResponse<'a> {
        throttle_time_ms: i32 [1..],
        error_code: Code,
        groups: Vec<ListedGroup<'a>>,
    }

    /// A group.
    pub struct ListedGroup<'a> {
        group_id: Cow<'a, str>,
        protocol_type: Cow<'a, str>,
        group_state: Cow<'a, str> [4..],
    }

    /// Deletes groups with their offsets.
    pub struct DeleteGroupsRequest<'a> {
        groups_names: Vec<Cow<'a, str>>,
    }

    /// How it went for each.
    pub struct DeleteGroupsResponse<'a> {
        throttle_time_ms: i32,
        results: Vec<DeletedGroup<'a>>,
    }

    /// A group's result.
    pub struct DeletedGroup<'a> {
        group_id: Cow<'a, str>,
        error_code: Code,
    }
}
