"""
Every wording of our prompts for published data sets, by task (toy/scenes.py has its own). What a data set asks in its
own words stays as published.

The papers print only SHORT_ANSWER; the other wordings are ours. A record takes the wording that its id hashes to, so a
corpus always converts to the same bytes.
"""
import zlib

IMAGE_LINE = "<image>\n"                    # the first line of a question about an image
SHORT_ANSWER = "Answer the question using a single word or phrase."                # the paper's words, Sec. 4.1.1


def short(*questions):
    return tuple(f"{question}\n{SHORT_ANSWER}" for question in questions)


PROMPTS = {
    "caption": ("Describe this image in one sentence.", "Write a short caption for this aerial image.",
                "What does this remote sensing image show? Answer in one sentence.",
                "Summarize the content of the image in one sentence.",
                "Give a brief description of this satellite image."),
    "scene": ("What kind of scene is this?", "Name the scene class of this aerial image.",
              "Which type of land use or place does the image show?"),
    "question": short("{question}"),
    # of photographs, worded as RSVQA's
    "rural or urban": short("Is it a rural or an urban area"),
    "thing": short("Is there {one}?", "Is {one} present?", "Is {one} present in the image?",
                   "Is there {one} in the image?"),
    "more": short("Are there more {many} than {few}?", "Are there more {many} than {few} in the image?",
                  "Are there less {few} than {many}?"),
    # about regions, each named once; {one} is a class with its article
    "region class": short("What is <region>?", "What kind of object is <region>?",
                          "Which class does <region> belong to?"),
    "region caption": ("Describe <region> in one sentence.", "Write a short description of <region>.",
                       "What does <region> show? Answer in one sentence."),
    "region detail": ("Describe <region> in detail.", "Give a detailed description of <region>.",
                      "What can you tell about <region>, its size, its place and what is around it?"),
    "region position": short("Where in the image is <region>?", "In which part of the image does <region> lie?"),
    "region count": short("How many objects of the same kind as <region> are there, itself included?",
                          "Counting <region>, how many objects of its kind does the image show?"),
    "same kind": short("Are <region1> and <region2> of the same kind?",
                       "Do <region1> and <region2> show the same kind of object?"),
    "larger": short("Is <region1> larger than <region2>?", "Does <region1> cover more of the image than <region2>?"),
    "region reasoning": ("What do the surroundings of <region> say about it?",
                         "Look at what is around <region>. What follows from it?"),
    "region presence": short("Is <region> {one}?", "Does <region> show {one}?"),
    "presence": short("Is there {one} in the image?", "Does the image show {one}?"),
    # before the first question of an Osprey row whose answers name regions by number
    "region names": ("The image has these regions: {regions}.",),
}
SCENE_TEXT = "a remote sensing image of the scene class {name}"                    # an answer, where there is no text


def choose_prompt(task, record_id, **fields):
    """The wording of a task for this record; fields fill its braces."""
    wordings = PROMPTS[task]
    return wordings[stable_hash(record_id) % len(wordings)].format(**fields)


def stable_hash(text):
    return zlib.crc32(text.encode(errors="surrogatepass"))                         # hash() differs from run to run
