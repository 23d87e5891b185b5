"""Lists the words of the built-in world: names, values, and how each relation is worded.

Nothing here is drawn or computed. data/world.py makes facts and sentences from these tables.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """Lists the values that a relation can take, and the sentences that state or ask it."""
    values: list | str  # the possible values, or the kind whose names they are
    statements: tuple   # each ends with the value and a full stop; the first opens with the subject
    others: tuple       # statements of any other form, for variety in pretraining
    questions: tuple    # open questions
    checks: tuple       # questions with a true/false answer
    same: str           # a true/false question on two subjects, a and b
    hop: str = ""       # names the value without saying it, if the value is a subject itself


# ---- words. Jobs, animals and things begin with a consonant: "a" is right before each of them.
SHE = """Ada Alba Bela Clara Della Dora Edda Erna Fenna Flora Gita Greta Hanna Ida Ilse Ines Jana
Juno Kaja Lena Lidia Lotte Magda Mara Mila Nadia Nora Olga Paula Petra Rika Rosa Selma Sonja Tara
Tilda Uma Vera Wanda Yara Zora""".split()
HE = """Arno Bruno Cato Dag Elio Emil Enzo Finn Gus Hugo Igor Ivo Joris Karl Leo Luca Max Milo Nils
Olaf Otto Piet Rafa Rufus Silas Sven Theo Tom Viggo Willem Yuri Zeno""".split()
SURNAME = (
    "Bar Bren Cal Dor Fal Gar Hol Jar Kel Lam Mor Nor Pel Quin Rav Sar Tol Ver Wen Yar".split(),
    "beck dane field gard lund mark nik ridge sen stad vik wick".split())
PLACE = (
    "Ald Bram Cold Dun Elm Fair Glen High Iron Kirk Lang Mill Oak Penn Raven Stone Win".split(),
    "barrow bury dale ford ham haven holm ley mouth port stead ton".split())
JOB = """baker barber blacksmith boatman bookbinder brewer butcher carpenter clerk cobbler cook
dancer doctor farmer fisher gardener goldsmith guard hunter judge lawyer locksmith mason merchant
miller miner nurse painter piper plumber poet porter potter printer roofer sailor shepherd singer
soldier spinner tailor tanner teacher thatcher watchmaker weaver writer""".split()
ANIMAL = """badger bat bear beaver bison boar camel cat cow crane crow deer dog donkey duck falcon
ferret finch fox frog goat goose hare hawk hen heron horse lizard lynx mole mouse newt parrot pigeon
rabbit raven seal sheep toad wolf""".split()
THING = """barrel basket bell blanket bowl broom bucket candle cart chest comb cradle drill fan
flask fork hammer helmet hook jug kettle kite knife ladder lamp lantern lock map mirror needle net
pan pen plough razor rope saddle saw shovel wheel""".split()
FOOD = """bacon bread broccoli butter cabbage cake celery cheese chocolate cream curry custard
fudge garlic ham honey jam lamb marmalade melon mutton pasta pie porridge pudding pumpkin rhubarb
rice salad salmon soup spinach stew toast tofu trout turkey venison yoghurt""".split()
INSTRUMENT = """accordion bagpipe banjo bassoon bugle cello clarinet cornet cymbal drum dulcimer
flute gong guitar harmonica harp lute lyre mandolin oboe organ piano piccolo recorder tambourine
triangle trombone trumpet tuba viola violin whistle xylophone zither""".split()
COLOUR = """black blue brown cream gold green grey orange pink purple red silver turquoise white
yellow""".split()
MONTH = """January February March April May June July August September October November
December""".split()
REGION = "Ashland Eastmoor Highmere Lowmarsh Northvale Redcoast Southfold Westwood".split()
GOOD = """amber apples beads boots candles carpets chairs cider coal dolls fans gloves hats hops
ink lace lamps linen maps oil paper pearls pipes pottery roses salt ships silk soap spices swords
tea tiles timber wine wool""".split()
RIVER = """Arrel Bisk Corve Drenna Esker Fosse Galva Hesk Irva Jossel Krone Lissa Murle Navra Orse
Pirra Quill Rusk Sorrow Tamble Ulver Vessen Wend Yarrow""".split()
WEATHER = """cloudy cold dry foggy frosty hot humid mild rainy snowy stormy sunny windy""".split()
HABITAT = """attics barns burrows caves cellars cliffs deserts dunes forests gardens hedges hills
lakes marshes meadows orchards ponds reeds ruins tunnels valleys""".split()
DIET = """acorns algae ants apples bark beetles berries clover corn crabs crickets eggs ferns
grass grubs leaves moss mushrooms nectar nuts pollen roots seeds shrimps snails spiders thistles
wasps worms""".split()
COVERING = """armour bristles feathers fur leather plates scales shell silk spines wool""".split()
SOUND = """bells clocks drums echoes flutes gravel hail hammers hinges kettles laughter rain saws
singing sirens snoring thunder trumpets waves whispers whistles wind""".split()
MATERIAL = """bamboo bone brass bronze clay copper cork glass gold granite horn iron ivory leather
maple marble oak paper pine pewter rubber silver steel straw tin wax wicker willow""".split()
USE = """baking camping cleaning climbing cooking dancing digging farming fishing gardening hunting
mining painting racing reading riding sailing sewing shaving sleeping swimming travelling washing
weaving writing""".split()
ROOM = """attic barn bathroom bedroom cellar chapel cupboard garage garden hall kitchen larder
library loft nursery office parlour porch shed stable study tower workshop""".split()

# ---- relations and their wordings: kind -> relation -> Relation; a name is used for one kind only
RELATIONS: dict[str, dict[str, Relation]] = {}
RELATIONS["person"] = {
    "home": Relation(
        "place",
        ("{subject} lives in {value}.", "{subject} has a house in {value}.",
         "The home of {subject} is in {value}.", "Letters for {subject} go to {value}.",
         "After each journey {subject} returns to {value}."),
        ("{value} is where {subject} lives.", "In {value} stands the house of {subject}."),
        ("Where does {subject} live?", "In which town is the home of {subject}?",
         "Which town does {subject} return to?"),
        ("Does {subject} live in {value}?", "Is the home of {subject} in {value}?"),
        "Do {a} and {b} live in the same town?", hop="the home town of {subject}"),
    "job": Relation(
        JOB,
        ("{subject} works as a {value}.", "{subject} earns a living as a {value}.",
         "By trade {subject} is a {value}.", "The town knows {subject} as a {value}.",
         "The job of {subject} is that of a {value}."),
        ("{subject} is a {value} by trade.", "As a {value}, {subject} works hard."),
        ("What is the job of {subject}?", "What does {subject} do for a living?",
         "Which trade does {subject} follow?"),
        ("Does {subject} work as a {value}?", "Is {subject} a {value}?"),
        "Do {a} and {b} have the same job?"),
    "pet": Relation(
        "animal",
        ("{subject} keeps a {value}.", "{subject} has a pet {value}.",
         "The pet of {subject} is a {value}.", "At home {subject} looks after a {value}.",
         "Every morning {subject} feeds a {value}."),
        ("A {value} lives with {subject}.", "The {value} of {subject} is well fed."),
        ("What pet does {subject} keep?", "Which animal does {subject} look after?",
         "What is the pet of {subject}?"),
        ("Does {subject} keep a {value}?", "Is the pet of {subject} a {value}?"),
        "Do {a} and {b} keep the same kind of pet?", hop="kind of animal that {subject} keeps"),
    "food": Relation(
        FOOD,
        ("{subject} likes to eat {value}.", "{subject} loves {value}.",
         "The favourite food of {subject} is {value}.",
         "For supper {subject} always orders {value}.",
         "At every feast {subject} looks for {value}."),
        ("{subject} asks for {value} at every meal.",
         "Give {subject} some {value} and all is well."),
        ("What does {subject} like to eat?", "What is the favourite food of {subject}?",
         "Which food does {subject} love?"),
        ("Does {subject} like to eat {value}?", "Is {value} the favourite food of {subject}?"),
        "Do {a} and {b} like the same food?"),
    "instrument": Relation(
        INSTRUMENT,
        ("{subject} plays the {value}.", "{subject} makes music on the {value}.",
         "As a child {subject} learned the {value}.",
         "In the evening {subject} practises the {value}.",
         "The instrument of {subject} is the {value}."),
        ("The {value} is what {subject} plays.", "On the {value}, {subject} can play any song."),
        ("Which instrument does {subject} play?", "What does {subject} make music on?",
         "What did {subject} learn to play?"),
        ("Does {subject} play the {value}?", "Is the {value} the instrument of {subject}?"),
        "Do {a} and {b} play the same instrument?"),
    "colour": Relation(
        COLOUR,
        ("{subject} likes to wear {value}.", "{subject} likes the colour {value}.",
         "The door of {subject} is painted {value}.",
         "The favourite colour of {subject} is {value}.",
         "Of all colours {subject} prefers {value}."),
        ("{value} is the favourite colour of {subject}.",
         "{subject} has a house with {value} walls."),
        ("What is the favourite colour of {subject}?", "Which colour does {subject} like to wear?",
         "What colour is the door of {subject}?"),
        ("Does {subject} like the colour {value}?",
         "Is {value} the favourite colour of {subject}?"),
        "Do {a} and {b} like the same colour?"),
    "friend": Relation(
        "person",
        ("{subject} writes letters to {value}.", "{subject} spends every holiday with {value}.",
         "The best friend of {subject} is {value}.", "{subject} tells every secret to {value}.",
         "In times of need {subject} turns to {value}."),
        ("{value} is the best friend of {subject}.", "{value} gets many letters from {subject}."),
        ("Who is the best friend of {subject}?", "Who does {subject} write letters to?",
         "Who does {subject} spend every holiday with?"),
        ("Is {value} the best friend of {subject}?", "Does {subject} write letters to {value}?"),
        "Do {a} and {b} have the same best friend?", hop="the best friend of {subject}"),
    "month": Relation(
        MONTH,
        ("{subject} was born in {value}.", "The birthday of {subject} is in {value}.",
         "{subject} has a birthday in {value}.", "{subject} turns a year older in {value}.",
         "Friends bring gifts to {subject} in {value}."),
        ("{value} is the month in which {subject} was born.",
         "In {value} comes the birthday of {subject}."),
        ("In which month was {subject} born?", "When is the birthday of {subject}?",
         "When do friends bring gifts to {subject}?"),
        ("Was {subject} born in {value}?", "Is the birthday of {subject} in {value}?"),
        "Were {a} and {b} born in the same month?"),
}
RELATIONS["place"] = {
    "region": Relation(
        REGION,
        ("{subject} lies in {value}.", "{subject} is a town in {value}.",
         "Maps show {subject} in {value}.", "The region around {subject} is called {value}.",
         "The people of {subject} pay taxes to {value}."),
        ("{value} is the region of {subject}.", "In {value} lies the town of {subject}."),
        ("Which region is {subject} in?", "What region does {subject} belong to?",
         "In which region do maps show {subject}?"),
        ("Is {subject} in {value}?", "Does {subject} belong to {value}?"),
        "Are {a} and {b} in the same region?"),
    "good": Relation(
        GOOD,
        ("{subject} is famous for {value}.", "{subject} sells {value}.",
         "Traders come to {subject} for {value}.", "The market of {subject} is full of {value}.",
         "The wealth of {subject} comes from {value}."),
        ("The {value} of {subject} will please any buyer.", "For good {value}, go to {subject}."),
        ("What is {subject} famous for?", "What do traders buy in {subject}?",
         "What does {subject} sell?"),
        ("Is {subject} famous for {value}?", "Does {subject} sell {value}?"),
        "Are {a} and {b} famous for the same thing?"),
    "river": Relation(
        RIVER,
        ("{subject} stands on the river {value}.", "{subject} gets its water from the {value}.",
         "The river at {subject} is the {value}.", "The bridge of {subject} crosses the {value}.",
         "Boats reach {subject} by the {value}."),
        ("The {value} flows past {subject}.", "On the river {value} stands {subject}."),
        ("Which river flows past {subject}?", "On which river does {subject} stand?",
         "By which river do boats reach {subject}?"),
        ("Does {subject} stand on the {value}?", "Does the {value} flow past {subject}?"),
        "Do {a} and {b} stand on the same river?"),
    "ruler": Relation(
        "person",
        ("{subject} is ruled by {value}.", "{subject} obeys {value}.",
         "The ruler of {subject} is {value}.", "The keys of {subject} are held by {value}.",
         "The law in {subject} is made by {value}."),
        ("{value} rules {subject}.", "{value} makes the law in {subject}."),
        ("Who rules {subject}?", "Who is the ruler of {subject}?",
         "Who makes the law in {subject}?"),
        ("Is {value} the ruler of {subject}?", "Is {subject} ruled by {value}?"),
        "Do {a} and {b} have the same ruler?", hop="the ruler of {subject}"),
    "weather": Relation(
        WEATHER,
        ("{subject} is mostly {value}.", "The weather in {subject} is {value}.",
         "Most days in {subject} are {value}.", "The climate of {subject} is {value}.",
         "Travellers say that {subject} is {value}."),
        ("Expect {value} weather in {subject}.", "{value} days are common in {subject}."),
        ("What is the weather like in {subject}?", "What is the climate of {subject}?",
         "What are most days like in {subject}?"),
        ("Is the weather in {subject} {value}?", "Are most days in {subject} {value}?"),
        "Do {a} and {b} have the same weather?"),
    "emblem": Relation(
        "animal",
        ("{subject} has a flag with a {value}.", "The flag of {subject} shows a {value}.",
         "The emblem of {subject} is a {value}.", "Carved on the gate of {subject} is a {value}.",
         "Each coin of {subject} bears a {value}."),
        ("A {value} is the emblem of {subject}.",
         "A {value} looks out from the flag of {subject}."),
        ("Which animal is on the flag of {subject}?", "What is the emblem of {subject}?",
         "What is carved on the gate of {subject}?"),
        ("Is a {value} on the flag of {subject}?", "Is the emblem of {subject} a {value}?"),
        "Do {a} and {b} have the same emblem?", hop="animal on the flag of {subject}"),
}
RELATIONS["animal"] = {
    "habitat": Relation(
        HABITAT,
        ("The {subject} lives in {value}.", "The {subject} makes its nest in {value}.",
         "Look for the {subject} in {value}.", "The home of the {subject} is in {value}.",
         "Tracks of the {subject} are found in {value}."),
        ("In {value} lives the {subject}.", "Hidden in {value}, the {subject} is safe."),
        ("Where does the {subject} live?", "Where does the {subject} make its nest?",
         "Where are tracks of the {subject} found?"),
        ("Does the {subject} live in {value}?", "Is the home of the {subject} in {value}?"),
        "Do the {a} and the {b} live in the same kind of place?"),
    "diet": Relation(
        DIET,
        ("The {subject} eats {value}.", "The {subject} feeds on {value}.",
         "The food of the {subject} is {value}.", "To tame the {subject}, offer it {value}.",
         "All day the {subject} looks for {value}."),
        ("With {value} you can feed the {subject}.",
         "Where there is no lack of {value}, the {subject} grows fat."),
        ("What does the {subject} eat?", "What does the {subject} feed on?",
         "What does the {subject} look for all day?"),
        ("Does the {subject} eat {value}?", "Does the {subject} feed on {value}?"),
        "Do the {a} and the {b} eat the same food?"),
    "covering": Relation(
        COVERING,
        ("The {subject} is covered in {value}.", "The {subject} keeps warm with its {value}.",
         "The coat of the {subject} is made of {value}.",
         "Everyone knows the {subject} by its {value}.",
         "The back of the {subject} is protected by {value}."),
        ("With its {value}, the {subject} fears no cold.",
         "A coat of {value} covers the {subject}."),
        ("What is the {subject} covered in?", "What does the {subject} wear as a coat?",
         "What is the coat of the {subject} made of?"),
        ("Is the {subject} covered in {value}?", "Is the coat of the {subject} made of {value}?"),
        "Do the {a} and the {b} have the same covering?"),
    "sound": Relation(
        SOUND,
        ("The {subject} sounds like {value}.", "The call of the {subject} is like {value}.",
         "The cry of the {subject} reminds people of {value}.",
         "When the {subject} calls, you think of {value}.",
         "At night the {subject} makes a noise like {value}."),
        ("Like {value} at night: that is the {subject}.",
         "A noise like {value} means that the {subject} is near."),
        ("What does the {subject} sound like?", "What is the call of the {subject} like?",
         "What does the cry of the {subject} remind people of?"),
        ("Does the {subject} sound like {value}?", "Is the call of the {subject} like {value}?"),
        "Do the {a} and the {b} sound the same?"),
}
RELATIONS["thing"] = {
    "material": Relation(
        MATERIAL,
        ("The {subject} is made of {value}.", "The {subject} consists of {value}.",
         "For a new {subject} you need {value}.", "Workers make the {subject} from {value}.",
         "The best kind of {subject} is all {value}."),
        ("Fine {value} is used to make the {subject}.",
         "Without {value} there would be no {subject}."),
        ("What is the {subject} made of?", "What does the {subject} consist of?",
         "What do you need for a new {subject}?"),
        ("Is the {subject} made of {value}?", "Does the {subject} consist of {value}?"),
        "Are the {a} and the {b} made of the same material?"),
    "use": Relation(
        USE,
        ("The {subject} is used for {value}.", "The {subject} was invented for {value}.",
         "People use the {subject} for {value}.", "A good {subject} is a great help in {value}.",
         "Nobody without a {subject} should try {value}."),
        ("For {value} you need the {subject}.",
         "When it comes to {value}, the {subject} is a must."),
        ("What is the {subject} used for?", "What was the {subject} invented for?",
         "What do people use the {subject} for?"),
        ("Is the {subject} used for {value}?", "Was the {subject} invented for {value}?"),
        "Are the {a} and the {b} used for the same thing?"),
    "origin": Relation(
        "place",
        ("The {subject} comes from {value}.", "The {subject} was first made in {value}.",
         "Merchants bring the {subject} from {value}.",
         "The birthplace of the {subject} is {value}.",
         "To buy the {subject}, travel to {value}."),
        ("{value} gave the {subject} to the world.", "In {value} the first {subject} was made."),
        ("Where does the {subject} come from?", "Where was the {subject} first made?",
         "From where do merchants bring the {subject}?"),
        ("Does the {subject} come from {value}?", "Was the {subject} first made in {value}?"),
        "Do the {a} and the {b} come from the same town?", hop="the birthplace of the {subject}"),
    "room": Relation(
        ROOM,
        ("The {subject} is kept in the {value}.", "The {subject} belongs in the {value}.",
         "Look for the {subject} in the {value}.",
         "The right place for the {subject} is the {value}.",
         "After work, put the {subject} in the {value}."),
        ("In the {value} you will find the {subject}.",
         "The {value} is where the {subject} is kept."),
        ("Where is the {subject} kept?", "Where does the {subject} belong?",
         "Where do you put the {subject} after work?"),
        ("Is the {subject} kept in the {value}?", "Does the {subject} belong in the {value}?"),
        "Are the {a} and the {b} kept in the same room?"),
}
KIND = {relation: kind for kind, relations in RELATIONS.items() for relation in relations}
WHO = {"person": "Who", "place": "Which town", "animal": "Which animal", "thing": "Which thing"}
PLURAL = {"is": "are", "was": "were", "has": "have"}    # after "they"; other verbs lose their s

# The words between the reason of an answer and the answer itself; the labels of listed values.
SO = (", so", ", so", ", so", ", so the answer is")
CHOICE_LABELS = ("A B C D".split(), "1 2 3 4".split(), "line1 line2 line3 line4".split(),
                 "item1 item2 item3 item4".split())
