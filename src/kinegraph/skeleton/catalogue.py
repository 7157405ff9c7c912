"""The known layouts as plain text.

The first six are those of TAO's pose classification: order, edges and centre are exact, because trained
weights depend on them. Edges and centre count from `first`, as in the source of each.
"""

from __future__ import annotations

from typing import NamedTuple


class Description(NamedTuple):
    """A layout in short: joint "both_x" stands for left_x and right_x, in this order; an edge is "a-b"."""

    name: str
    joints: str
    edges: str
    centre: int
    first: int = 0


KINECT_LIMBS = """
    left_shoulder left_elbow left_wrist left_hand right_shoulder right_elbow right_wrist right_hand
    left_hip left_knee left_ankle left_foot right_hip right_knee right_ankle right_foot"""
KINECT_FINGERS = "left_hand_tip left_thumb right_hand_tip right_thumb"
OPENPOSE_ARMS = "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist"
OPENPOSE_LEGS = "right_hip right_knee right_ankle left_hip left_knee left_ankle"
OPENPOSE_FACE = "right_eye left_eye right_ear left_ear"

DESCRIPTIONS = (
    Description(
        "nvidia",
        """pelvis both_hip torso both_knee neck both_ankle both_big_toe both_small_toe both_heel nose both_eye
        both_ear both_shoulder both_elbow both_wrist both_pinky_knuckle both_middle_tip both_index_knuckle
        both_thumb_tip""",
        """0-1 0-2 0-3 1-4 2-5 3-6 4-7 5-8 7-9 8-10 9-11 10-12 7-13 8-14 6-15 15-16 15-17 16-18 17-19
        1-20 2-21 6-20 6-21 20-22 21-23 22-24 23-25 24-26 25-27 24-28 25-29 24-30 25-31 24-32 25-33""",
        centre=0,
    ),
    Description(
        "openpose",
        f"{OPENPOSE_ARMS} {OPENPOSE_LEGS} {OPENPOSE_FACE}",
        "4-3 3-2 7-6 6-5 13-12 12-11 10-9 9-8 11-5 8-2 5-1 2-1 0-1 15-0 14-0 17-15 16-14",
        centre=1,
    ),
    Description(
        "human3.6m",
        """pelvis right_hip right_knee right_ankle left_hip left_knee left_ankle spine thorax neck head
        left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist""",
        "9-10 8-9 7-8 1-7 4-7 0-1 0-4 9-11 9-14 11-12 14-15 12-13 15-16 1-2 2-3 4-5 5-6",
        centre=8,
    ),
    Description(
        "ntu-rgb+d",
        f"spine_base spine_middle neck head {KINECT_LIMBS} spine_shoulder {KINECT_FINGERS}",
        """1-2 2-21 3-21 4-3 5-21 6-5 7-6 8-7 9-21 10-9 11-10 12-11 13-1 14-13 15-14 16-15 17-1 18-17 19-18
        20-19 22-23 23-8 24-25 25-12""",
        centre=21,
        first=1,
    ),
    Description(
        "ntu_edge",
        f"spine_base spine_middle neck head {KINECT_LIMBS} {KINECT_FINGERS}",
        """1-2 3-2 4-3 5-2 6-5 7-6 8-7 9-2 10-9 11-10 12-11 13-1 14-13 15-14 16-15 17-1 18-17 19-18 20-19
        21-22 22-8 23-24 24-12""",
        centre=3,
        first=1,
    ),
    Description(
        "coco",
        "nose both_eye both_ear both_shoulder both_elbow both_wrist both_hip both_knee both_ankle",
        "16-14 14-12 17-15 15-13 12-13 6-12 7-13 6-7 8-6 9-7 10-8 11-9 2-3 2-1 3-1 4-2 5-3 4-6 5-7",
        centre=1,
        first=1,
    ),
    Description(
        "kinect_v1",
        f"hip_centre spine shoulder_centre head {KINECT_LIMBS}",
        "0-1 1-2 2-3 2-4 4-5 5-6 6-7 2-8 8-9 9-10 10-11 0-12 12-13 13-14 14-15 0-16 16-17 17-18 18-19",
        centre=1,
    ),
    # MediaPipe links the face to nothing: the links from the nose to mouth and shoulders make it one graph
    Description(
        "mediapipe_pose",
        """nose left_eye_inner left_eye left_eye_outer right_eye_inner right_eye right_eye_outer
        both_ear both_mouth both_shoulder both_elbow both_wrist both_pinky both_index both_thumb
        both_hip both_knee both_ankle both_heel both_foot_index""",
        """0-1 1-2 2-3 3-7 0-4 4-5 5-6 6-8 9-10 0-9 0-10 0-11 0-12 11-12 11-13 13-15 15-17 15-19 15-21 17-19
        12-14 14-16 16-18 16-20 16-22 18-20 11-23 12-24 23-24 23-25 25-27 27-29 27-31 29-31
        24-26 26-28 28-30 28-32 30-32""",
        centre=0,
    ),
    Description(
        "mediapipe_hand",
        """wrist thumb_cmc thumb_mcp thumb_ip thumb_tip index_mcp index_pip index_dip index_tip
        middle_mcp middle_pip middle_dip middle_tip ring_mcp ring_pip ring_dip ring_tip
        pinky_mcp pinky_pip pinky_dip pinky_tip""",
        """0-1 1-2 2-3 3-4 0-5 5-6 6-7 7-8 5-9 9-10 10-11 11-12 9-13 13-14 14-15 15-16
        13-17 0-17 17-18 18-19 19-20""",
        centre=0,
    ),
    # BODY_25 of OpenPose
    Description(
        "openpose_25",
        f"""{OPENPOSE_ARMS} hip_centre {OPENPOSE_LEGS} {OPENPOSE_FACE}
        left_big_toe left_small_toe left_heel right_big_toe right_small_toe right_heel""",
        """1-0 1-2 2-3 3-4 1-5 5-6 6-7 1-8 8-9 9-10 10-11 8-12 12-13 13-14 0-15 15-17 0-16 16-18
        14-19 19-20 14-21 11-22 22-23 11-24""",
        centre=1,
    ),
    # Points marked by people (Zhang et al., ICCV 2013). There is no neck and no hip centre: only the head has no side
    Description(
        "penn_action",
        "head both_shoulder both_elbow both_wrist both_hip both_knee both_ankle",
        "0-1 0-2 1-2 7-8 1-3 3-5 1-7 7-9 9-11 2-4 4-6 2-8 8-10 10-12",
        centre=0,
    ),
)
