"""The words of the generated shop: 58 kinds of things, 60 uses, materials, styles, colours, sizes, brands.

Tables as text, one thing per line, so that a reader sees the shop at a glance. Each glossary gives the shop's own word
first and then what customers may type instead; where two materials share such a word, it asks for either.
"""

from dataclasses import dataclass

# category path | nouns in titles | further nouns in queries | uses | materials | sizes
_KINDS = """
Hardware > Door Hardware > Hinges | Hinge, Butt Hinge | door pivot | cabinet, gate, interior door | stainless steel, brass, black iron | inch
Hardware > Door Hardware > Handles | Door Lever, Door Knob | door handle, latch | interior door, bathroom, front door | stainless steel, brass, black iron | backset
Hardware > Door Hardware > Locks | Deadbolt, Padlock | lock | front door, gate, shed | stainless steel, brass, black iron | inch
Hardware > Cabinet Hardware | Cabinet Pull, Bar Pull | drawer handle, handle | cabinet, wardrobe, bathroom | stainless steel, brass, black iron, oak | inch
Hardware > Hooks & Rails > Wall Hooks | Wall Hook, Hook Rail | hanger, peg | coats, towels, keys | stainless steel, brass, black iron, oak, pine | hooks
Hardware > Shelf Supports > Brackets > Heavy Duty | Shelf Bracket | shelf holder | books, plants, garage | black iron, stainless steel, pine | inch
Hardware > Fasteners > Screws | Wood Screw, Deck Screw | fixing, bolt | deck, drywall, fence | stainless steel, galvanized steel, brass | screw
Tools > Hand Tools > Screwdrivers | Screwdriver, Bit Driver | turnscrew | furniture assembly, electronics, drywall | chrome steel, rubber, beech | pieces
Tools > Hand Tools > Hammers | Claw Hammer, Mallet | striking tool | framing, furniture assembly, fence | chrome steel, rubber, beech | ounce
Tools > Measuring | Tape Measure, Level | ruler, gauge | framing, picture hanging, deck | chrome steel, rubber, aluminium | feet
Tools > Workshop > Tool Storage | Pegboard, Tool Organizer | tool rack | garage, shed, electronics | galvanized steel, plastic, pine | general
Kitchen > Cookware > Pans | Frying Pan, Skillet | fryer, cooking pan | eggs, searing, camping | stainless steel, cast iron, aluminium | inch
Kitchen > Cookware > Pots | Stockpot, Saucepan | cooking pot | soup, pasta, camping | stainless steel, cast iron, aluminium | quart
Kitchen > Cookware > Bakeware > Trays | Baking Sheet, Roasting Pan | oven tray, tin | cookies, roasting, bread | stainless steel, aluminium, silicone | inch
Kitchen > Food Preparation > Boards | Cutting Board, Serving Board | chopping block | meat, bread, cheese | bamboo, walnut, acacia, plastic | general
Kitchen > Food Preparation > Knives | Chef Knife, Paring Knife | blade, cutter | meat, bread, vegetables | stainless steel, carbon steel, ceramic | inch
Kitchen > Food Preparation > Bowls | Mixing Bowl, Prep Bowl | basin | bread, salad, cookies | stainless steel, glass, ceramic, bamboo | quart
Kitchen > Food Storage | Food Canister, Storage Jar | container, tub | coffee, pasta, cookies | glass, stainless steel, ceramic, plastic | quart
Kitchen > Drinkware > Mugs | Mug, Tumbler | cup, beaker | coffee, tea, camping | ceramic, stainless steel, glass | ounce
Kitchen > Coffee & Tea | Kettle, Teapot | water boiler | coffee, tea, camping | stainless steel, cast iron, glass, ceramic | quart
Kitchen > Kitchen Linens | Dish Towel, Apron | cloth | drying dishes, cookies, grilling | cotton, linen, polyester | general
Kitchen > Sink & Dish > Dish Racks | Dish Rack, Drainer | drying stand | drying dishes, small kitchen, vegetables | stainless steel, bamboo, plastic | general
Kitchen > Sink & Dish > Faucets | Kitchen Faucet, Mixer Tap | spigot, tap | small kitchen, drying dishes, laundry | stainless steel, brass, black iron | inch
Bath > Faucets & Showers > Shower Heads | Shower Head, Hand Shower | sprayer | bathroom, pets, low pressure | chrome steel, brass, plastic | inch
Bath > Faucets & Showers > Basin Faucets | Basin Faucet, Sink Tap | spigot, mixer | bathroom, guest toilet, low pressure | chrome steel, brass, stainless steel | inch
Bath > Bath Accessories > Towel Bars | Towel Bar, Towel Ring | towel rail, rod | towels, guest toilet, bathroom | chrome steel, brass, stainless steel, bamboo | inch
Bath > Bath Accessories > Soap & Tissue | Soap Dispenser, Tissue Holder | pump, stand | guest toilet, bathroom, drying dishes | ceramic, stainless steel, bamboo, glass | general
Bath > Bath Textiles > Towels | Bath Towel, Hand Towel | bath sheet | beach, bathroom, pets | cotton, linen, bamboo | general
Bath > Bath Textiles > Mats | Bath Mat, Shower Mat | rug, floor pad | bathroom, elderly, pets | cotton, rubber, bamboo, cork | general
Bath > Laundry | Laundry Hamper, Clothes Basket | washing bin | laundry, wardrobe, kids | bamboo, cotton, plastic, rattan | general
Garden > Planters > Pots | Planter, Flower Pot | plant tub | plants, balcony, herbs | terracotta, ceramic, plastic, galvanized steel | inch
Garden > Planters > Raised Beds | Raised Bed, Garden Box | growing box | vegetables, herbs, balcony | cedar, galvanized steel, plastic | feet
Garden > Watering > Hoses | Garden Hose, Soaker Hose | water pipe | lawn, vegetables, car washing | rubber, polyester, plastic | feet
Garden > Watering > Cans | Watering Can | pourer, sprinkler | plants, herbs, balcony | galvanized steel, plastic, copper | quart
Garden > Garden Tools > Digging | Garden Spade, Trowel | shovel, digger | vegetables, lawn, planting bulbs | stainless steel, carbon steel, ash wood | inch
Garden > Garden Tools > Cutting | Pruner, Hedge Shear | clippers, secateurs | hedges, roses, vegetables | carbon steel, stainless steel, aluminium | inch
Garden > Outdoor Furniture > Seating | Patio Chair, Garden Bench | outdoor seat | balcony, grilling, poolside | teak, aluminium, rattan, cedar | general
Garden > Outdoor Furniture > Tables | Bistro Table, Patio Table | outdoor desk | balcony, grilling, poolside | teak, aluminium, black iron | general
Garden > Grilling | Grill Brush, Grill Tongs | barbecue tool | grilling, camping, searing | stainless steel, beech, brass | inch
Garden > Fencing | Fence Panel, Trellis | screen, lattice | fence, roses, privacy | cedar, black iron, plastic | feet
Lighting > Ceiling Lights > Pendants | Pendant Light, Hanging Lamp | ceiling lamp | dining, small kitchen, reading | brass, glass, rattan, black iron | inch
Lighting > Ceiling Lights > Flush Mounts | Flush Mount Light | ceiling lamp | bathroom, hallway, laundry | glass, chrome steel, black iron | inch
Lighting > Lamps > Table Lamps | Table Lamp, Desk Lamp | bedside light | reading, bedroom, home office | ceramic, brass, oak, glass | general
Lighting > Lamps > Floor Lamps | Floor Lamp, Arc Lamp | standing light | reading, dining, home office | brass, black iron, oak | feet
Lighting > Outdoor Lighting | Wall Lantern, Path Light | outside lamp | front door, driveway, poolside | black iron, copper, aluminium, glass | inch
Home > Storage > Baskets | Storage Basket, Storage Bin | crate, tote | kids, blankets, wardrobe | rattan, cotton, plastic, galvanized steel | general
Home > Storage > Shelves | Wall Shelf, Bookcase | ledge, rack | books, plants, home office | oak, walnut, pine, black iron | inch
Home > Storage > Shoe Storage | Shoe Rack, Shoe Cabinet | shoe stand | hallway, wardrobe, kids | bamboo, pine, black iron, plastic | general
Home > Storage > Coat Racks | Coat Stand, Hall Tree | clothes tree | coats, hallway, home office | oak, black iron, bamboo | feet
Home > Furniture > Tables > Side Tables | Side Table, Nightstand | end table | bedroom, reading, small kitchen | oak, walnut, pine, black iron | general
Home > Furniture > Desks | Writing Desk, Standing Desk | workstation | home office, kids, electronics | oak, walnut, pine, black iron | inch
Home > Furniture > Seating | Bar Stool, Dining Chair | seat | dining, small kitchen, home office | oak, walnut, black iron, rattan | general
Home > Textiles > Cushions | Throw Pillow, Cushion Cover | pad | bedroom, reading, kids | cotton, linen, polyester | general
Home > Textiles > Throws | Throw Blanket, Quilt | cover, plaid | blankets, beach, pets | cotton, linen, polyester | general
Home > Textiles > Curtains | Curtain Panel, Roller Blind | drape, shade | bedroom, privacy, kids | linen, cotton, polyester, bamboo | feet
Home > Decor > Frames | Picture Frame, Wall Mirror | photo holder | picture hanging, hallway, guest toilet | oak, walnut, brass, aluminium | inch
Home > Pets | Pet Bed, Dog Mat | animal cushion | pets, blankets, beach | cotton, polyester, rubber | general
Cleaning | Broom, Dust Pan | sweeper | garage, hallway, pets | bamboo, plastic, galvanized steel | general
"""  # noqa: E501

# use: wording in a title | wording in a description | further wordings in queries
_USES = """
cabinet: Cabinet | cupboard doors and kitchen units | kitchen cupboard, cupboard
gate: Gate | heavy garden gates | driveway entrance, swing gate
interior door: Interior Door | rooms inside the house | inside rooms, bedroom door
bathroom: Bath | humid bathrooms and wet rooms | washroom, wet room
front door: Entry | the main entrance of the house | main entrance, outside door
shed: Shed | sheds and outbuildings | garden hut, outbuilding
wardrobe: Closet | wardrobes and closets | wardrobe, clothes cupboard
coats: Coat | jackets, coats and scarves | jackets, winter wear
towels: Towel | wet towels and robes | bathrobe, drying after bathing
keys: Key | keys and dog leashes by the door | car keys, leashes
books: Book | rows of heavy books | library, novels
plants: Plant | house plants of any size | greenery, indoor jungle
garage: Garage | garages and workshops | workshop, carport
deck: Decking | decks and terraces | terrace, wooden porch
drywall: Drywall | plasterboard and stud walls | plasterboard, gypsum
fence: Fence | garden fences and posts | boundary, paling
furniture assembly: Assembly | putting furniture together | flat pack, building a cabinet
electronics: Precision | small electronic devices | gadgets, computer repair
framing: Framing | timber framing on site | carpentry, stud work
picture hanging: Gallery | hanging pictures straight | wall art, photos
eggs: Egg | eggs and pancakes | omelette, breakfast
searing: Searing | searing at high heat | steak, browning
camping: Camping | campfires and travel | outdoors trip, hiking
soup: Soup | soups and stews for a crowd | stew, broth
pasta: Pasta | pasta and noodles | spaghetti, noodles
cookies: Cookie | cookies and pastry | biscuits, pastry
roasting: Roasting | roasts and vegetables in the oven | sunday dinner, turkey
bread: Bread | bread and dough | baker, sourdough
meat: Carving | meat and poultry | butcher, beef
cheese: Cheese | cheese and appetizers | party platter, charcuterie
vegetables: Vegetable | vegetables from the garden | veggies, greens
salad: Salad | salads and sides | lettuce, coleslaw
coffee: Coffee | coffee in the morning | espresso, barista
tea: Tea | tea at any hour | matcha, herbal brew
drying dishes: Sink | washing up and drying dishes | washing up, dishes
grilling: BBQ | grilling in the backyard | barbecue, cookout
small kitchen: Compact Kitchen | small kitchens and studios | tiny apartment, studio flat
laundry: Laundry | laundry rooms | washing day, dirty clothes
pets: Pet | dogs and cats | dog, cat owner
low pressure: Pressure Boost | houses with low water pressure | weak water flow, gravity fed
guest toilet: Powder Room | guest toilets | guests, half bath
beach: Beach | the beach and the pool | seaside, vacation
elderly: Non-Slip | safe steps for older people | seniors, anti slip
kids: Kids | children's rooms and toys | nursery, toys
balcony: Balcony | balconies and small patios | rooftop, small patio
herbs: Herb | kitchen herbs | basil, window sill
lawn: Lawn | lawns and large yards | grass, yard
car washing: Car Wash | washing cars and bikes | auto cleaning, vehicle
planting bulbs: Bulb | planting bulbs and seedlings | tulips, seedlings
hedges: Hedge | hedges and shrubs | bushes, shrubs
roses: Rose | roses and climbers | climbing flowers, thorny stems
poolside: Poolside | pools and sun decks | swimming pool, sunbathing
privacy: Privacy | keeping neighbours from looking in | nosy neighbours, block view
dining: Dining | dining rooms and long dinners | dinner table, family meals
reading: Reading | reading corners | cozy nook, study corner
hallway: Hallway | hallways and entrances | corridor, foyer
bedroom: Bedroom | bedrooms | sleeping room, bedside
home office: Office | working from home | work from home, study
driveway: Driveway | driveways and garden paths | path, walkway
blankets: Living Room | couches and blankets in the living room | couch, sofa
"""

_MATERIALS = """
stainless steel: inox, rustproof; brass: golden metal, gold; black iron: wrought iron, dark metal
chrome steel: shiny, chrome
galvanized steel: zinc, rustproof; carbon steel: forged; cast iron: heavy iron; aluminium: lightweight metal, rustproof
copper: reddish metal; oak: hardwood, wooden; walnut: dark wood, wooden; pine: softwood, wooden; beech: hardwood, wooden
bamboo: eco friendly, sustainable; acacia: exotic wood, wooden; teak: weatherproof wood, wooden
cedar: weatherproof wood, wooden; ash wood: hardwood, wooden; plastic: cheap, polymer; rubber: flexible, grippy
silicone: non stick, flexible; glass: transparent, see through; ceramic: porcelain, stoneware
terracotta: clay, earthenware; cotton: soft natural, organic fabric; linen: flax, breathable
polyester: synthetic, easy care; cork: eco friendly, natural bark; rattan: wicker, woven
"""

_STYLES = """
farmhouse: rustic, country; modern: contemporary, sleek; industrial: loft, factory look; vintage: retro, antique
scandinavian: nordic, hygge; coastal: nautical, hamptons; minimalist: simple, plain; traditional: classic, timeless
"""

_COLOURS = """
black: dark, ebony; white: ivory, bright; grey: charcoal, silver; navy: dark blue, marine; sage: light green, olive
sand: beige, cream; rust: orange, burnt; natural: undyed, raw
"""

SIZES = {
    "inch": ("2 in.", "4 in.", "6 in.", "8 in.", "12 in."),
    "backset": ("2-3/8 in.", "2-3/4 in."),
    "hooks": ("Single", "3-Hook", "5-Hook", "8-Hook"),
    "screw": ("#6 x 1 in.", "#8 x 2 in.", "#10 x 3 in."),
    "pieces": ("6 in.", "10 in.", "12-Piece"),
    "ounce": ("8 oz.", "12 oz.", "16 oz.", "20 oz."),
    "feet": ("3 ft.", "5 ft.", "8 ft.", "25 ft."),
    "quart": ("1 qt.", "2 qt.", "4 qt.", "8 qt."),
    "general": ("Small", "Medium", "Large", "X-Large"),
}
SIZE_WORDS = (("small", "mini", "little"), (), ("large", "big", "oversized"))
PACKS = (1, 1, 1, 2, 4, 10)
PACK_WORDS = {2: ("pair", "set of two"), 4: ("set of four", "4 pack"), 10: ("bulk", "contractor pack")}
_SYLLABLES = (("Al", "Bren", "Cor", "Dun", "El", "Fair", "Hol", "Kes"), ("by", "den", "field", "mar", "ridge", "wick"))
SERIES = ("Aspen", "Boden", "Cedra", "Delta", "Ember", "Fjord", "Grove", "Haven", "Iris", "Juno", "Lumen", "Nova")
CLOSING_WORDS = (
    "Ready to use.",
    "Two year guarantee.",
    "Easy to clean.",
    "Designed for daily use.",
    "Gift box included.",
)


@dataclass(frozen=True)
class Kind:
    """One kind of thing; uses and materials are places in USE_NAMES and MATERIAL_NAMES."""

    path: list[str]
    nouns: list[str]
    query_nouns: list[str]
    uses: list[int]
    materials: list[int]
    sizes: tuple[str, ...]


def _glossary(text: str) -> tuple[list[str], list[list[str]]]:
    entries = [entry.split(":") for entry in text.strip().replace("\n", ";").split(";")]
    return [name.strip() for name, _ in entries], [[w.strip() for w in words.split(",")] for _, words in entries]


MATERIAL_NAMES, MATERIAL_WORDS = _glossary(_MATERIALS)
STYLE_NAMES, STYLE_WORDS = _glossary(_STYLES)
COLOUR_NAMES, COLOUR_WORDS = _glossary(_COLOURS)
BRANDS = [first + second for first in _SYLLABLES[0] for second in _SYLLABLES[1]]
USE_NAMES = [line.split(":")[0] for line in _USES.strip().splitlines()]
USE_TITLES, USE_TEXTS, USE_WORDS = zip(
    *(
        (title.strip(), text.strip(), [word.strip() for word in words.split(",")])
        for title, text, words in (line.split(":")[1].split("|") for line in _USES.strip().splitlines())
    )
)


def read_kinds() -> list[Kind]:
    """The shop's kinds, in the order of the table."""
    kinds = []
    for line in _KINDS.strip().splitlines():
        path, nouns, more, uses, materials, sizes = (part.strip() for part in line.split("|"))
        nouns, more, uses, materials = (part.split(", ") for part in (nouns, more, uses, materials))
        materials = [MATERIAL_NAMES.index(name) for name in materials]
        kinds.append(Kind(path.split(" > "), nouns, more, [USE_NAMES.index(u) for u in uses], materials, SIZES[sizes]))
    return kinds
