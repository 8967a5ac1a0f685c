//! Messages with which a member joins, follows and leaves its group.

use std::borrow::Cow;

use crate::wire::kafka::{Code, message};

message! {
    /// Asks to become, or stay, a member; time-outs in milliseconds.
    pub struct JoinGroupRequest<'a> {
        group_id: Cow<'a, str>,
        session_timeout_ms: i32,
        rebalance_timeout_ms: i32 [1..; -1],
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>> [5..],
        protocol_type: Cow<'a, str>,
        protocols: Vec<JoinGroupProtocol<'a>>,
        reason: Option<Cow<'a, str>> [8..],
    }

    /// A protocol (an assignor, for consumers) and what the member has to say for it.
    pub struct JoinGroupProtocol<'a> {
        name: Cow<'a, str>,
        metadata: Cow<'a, [u8]>,
    }

    /// Comes when all have joined; the leader learns of all members.
    pub struct JoinGroupResponse<'a> {
        throttle_time_ms: i32 [2..],
        error_code: Code,
        generation_id: i32,
        protocol_type: Option<Cow<'a, str>> [7..],
        protocol_name: Option<Cow<'a, str>>,
        leader: Cow<'a, str>,
        skip_assignment: bool [9..],
        member_id: Cow<'a, str>,
        members: Vec<JoinGroupMember<'a>>,
    }

    /// A member and its metadata for the chosen protocol.
    pub struct JoinGroupMember<'a> {
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>> [5..],
        metadata: Cow<'a, [u8]>,
    }

    /// Asks for the assignment; the leader's brings all members'.
    pub struct SyncGroupRequest<'a> {
        group_id: Cow<'a, str>,
        generation_id: i32,
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>> [3..],
        protocol_type: Option<Cow<'a, str>> [5..],
        protocol_name: Option<Cow<'a, str>> [5..],
        assignments: Vec<SyncGroupAssignment<'a>>,
    }

    /// What the leader gives to a member.
    pub struct SyncGroupAssignment<'a> {
        member_id: Cow<'a, str>,
        assignment: Cow<'a, [u8]>,
    }

    /// The member's assignment.
    pub struct SyncGroupResponse<'a> {
        throttle_time_ms: i32 [1..],
        error_code: Code,
        protocol_type: Option<Cow<'a, str>> [5..],
        protocol_name: Option<Cow<'a, str>> [5..],
        assignment: Cow<'a, [u8]>,
    }

    /// Says that a member lives.
    pub struct HeartbeatRequest<'a> {
        group_id: Cow<'a, str>,
        generation_id: i32,
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>> [3..],
    }

    /// Says whether it has to join again.
    pub struct HeartbeatResponse {
        throttle_time_ms: i32 [1..],
        error_code: Code,
    }

    /// Says that members go: one until version 2, then several.
    pub struct LeaveGroupRequest<'a> {
        group_id: Cow<'a, str>,
        member_id: Cow<'a, str> [0..=2],
        members: Vec<LeaveGroupMember<'a>> [3..],
    }

    /// A member that goes, by member id or by instance id.
    pub struct LeaveGroupMember<'a> {
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>>,
        reason: Option<Cow<'a, str>> [5..],
    }

    /// Who has gone.
    pub struct LeaveGroupResponse<'a> {
        throttle_time_ms: i32 [1..],
        error_code: Code,
        members: Vec<LeaveGroupResult<'a>> [3..],
    }

    /// How it went for a member.
    pub struct LeaveGroupResult<'a> {
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>>,
        error_code: Code,
    }
}
